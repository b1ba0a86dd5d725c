"""iBOT: Image BERT Pre-Training with Online Tokenizer (arXiv 2111.07832)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from ..flags import Count, Fraction, Fractions, NonNegative, Positive, Several, flag
from ..losses import DINOLoss, iBOTPatchLoss
from ..losses.dino import warmup_temperature
from ..models.heads import Prototypes
from ..models.teacher import make_teacher
from .base import PerImages, Step, Task
from .branch import Network, width_of
from .dino import PROTOTYPE_NORM
from .masked import MaskedMethod, Pair, TokenBranch, dino_head
from .masks import MaskedPatches, Masking, no_masks
from .registry import register


@dataclass(frozen=True)
class IBOTSettings:
    """iBOT's settings, with the names and defaults of bytedance/ibot."""

    out_dim: Several = flag(8192, "number of prototypes of [CLS]")
    patch_out_dim: Several = flag(8192, "number of prototypes of the patches; a shared head has --out_dim")
    shared_head: bool = flag(False, "the student's [CLS] and patches share their prototypes; they always share the MLP")
    shared_head_teacher: bool = flag(True, "the teacher's do: both then follow the student's prototypes of [CLS]")
    hidden_dim: Count = flag(2048, "width of the head's hidden layers")
    bottleneck_dim: Several = flag(256, "dimension in which projections meet the prototypes")
    norm_last_layer: bool = flag(True, "keep the prototypes' norm at 1")
    momentum_teacher: Fraction = flag(0.996, "momentum of the teacher at the start")
    momentum_teacher_end: Fraction = flag(1.0, "momentum of the teacher at the end (cosine schedule)")
    pred_ratio: Fractions = flag((0.3,), "fraction of masked patches; of several, each global crop draws one")
    pred_ratio_var: Fractions = flag((0.0,), "half the range of each fraction, which is uniform in it")
    pred_shape: Literal["block", "rand"] = flag("block", "masks of rectangles, or of single patches")
    pred_start_epoch: NonNegative = flag(0.0, "epoch from which patches are masked")
    lambda1: NonNegative = flag(1.0, "weight of the loss of [CLS]")
    lambda2: NonNegative = flag(1.0, "weight of the loss of masked patches")
    student_temp: Positive = flag(0.1, "temperature of the student")
    warmup_teacher_temp: Positive = flag(0.04, "temperature of the teacher's [CLS] at the start")
    teacher_temp: Positive = flag(0.04, "temperature of the teacher's [CLS] after its warm-up")
    warmup_teacher_patch_temp: Positive = flag(0.04, "temperature of the teacher's patches at the start")
    teacher_patch_temp: Positive = flag(0.07, "temperature of the teacher's patches after their warm-up")
    warmup_teacher_temp_epochs: NonNegative = flag(30.0, "epochs of the warm-up of both temperatures")
    freeze_last_layer: NonNegative = flag(1.0, "epochs during which the prototypes are frozen")
    center_momentum: Fraction = flag(0.9, "momentum of the centre of the teacher's logits of [CLS]")
    center_momentum2: Fraction = flag(0.9, "momentum of the centre of the teacher's logits of the patches")
    no_centering: bool = flag(False, "do not centre the teacher's logits (collapses without --entropy)")


@register("ibot")
class IBOT(MaskedMethod):
    """DINO, and cross-entropy of masked patches with the teacher's patches; the twin adds the entropies of both."""

    Settings = IBOTSettings
    settings: IBOTSettings
    sized = MappingProxyType({"out_dim": PerImages(8, 256, 8192), "patch_out_dim": PerImages(8, 256, 8192)})
    center_of_all_patches = True

    def __init__(self, network: Network, settings: IBOTSettings, task: Task) -> None:
        s, backbone = settings, network(task.views.channels)
        super().__init__(s, task, backbone, Masking("pred_ratio", _ranges(s), s.pred_shape))

        def prototypes(count: int) -> Prototypes:
            return Prototypes(s.bottleneck_dim, count, learn_norm=not s.norm_last_layer, start=PROTOTYPE_NORM)

        head = dino_head(width_of(backbone), s.hidden_dim, s.bottleneck_dim)
        self.student = TokenBranch(
            backbone,
            head,
            prototypes(s.out_dim)
            if s.shared_head
            else {"cls": prototypes(s.out_dim), "patch": prototypes(self.prototype_counts().patch)},
        )
        self.teacher = make_teacher(self.student)
        if s.shared_head_teacher and isinstance(self.teacher.prototypes, nn.ModuleDict):
            del self.teacher.prototypes["patch"]
        mode = "none" if s.no_centering else "mean"
        self.loss = DINOLoss(
            s.out_dim,
            student_temp=s.student_temp,
            center_momentum=s.center_momentum,
            center_mode=mode,
        )
        self.patch_loss = iBOTPatchLoss(
            self.prototype_counts().patch,
            student_temp=s.student_temp,
            center_momentum=s.center_momentum2,
            center_mode=mode,
        )

    @classmethod
    def check(cls, settings: Any, batch: int) -> None:
        """Raise ValueError for ranges of masks or shared heads that do not fit together."""
        _ranges(settings)
        if settings.shared_head and not settings.shared_head_teacher:
            raise ValueError(
                "--shared_head_teacher: must be true with --shared_head true, got false. "
                "The teacher's prototypes of patches would follow no student's."
            )

    def masks_at(self, step: Step, batch: int) -> MaskedPatches:
        """Return the masks of this rank's images. Before ``pred_start_epoch`` they hide nothing."""
        if step.epoch < self.settings.pred_start_epoch:
            return no_masks(self.grids, batch)
        return super().masks_at(step, batch)

    def temperatures(self, step: Step) -> Pair:
        """Return the teacher's temperatures, which change from epoch to epoch."""
        s, epoch = self.settings, int(step.epoch)
        length, start = s.warmup_teacher_temp_epochs, int(s.pred_start_epoch)
        return Pair(
            warmup_temperature(epoch, length, s.warmup_teacher_temp, s.teacher_temp),
            warmup_temperature(max(epoch - start, 0), length, s.warmup_teacher_patch_temp, s.teacher_patch_temp),
        )

    def term_weights(self) -> Pair:
        """Return ``lambda1`` and ``lambda2``."""
        return Pair(self.settings.lambda1, self.settings.lambda2)

    def prototype_counts(self) -> Pair:
        """Return ``out_dim`` and ``patch_out_dim``, which is ``out_dim`` if a head is shared."""
        s = self.settings
        shared = s.shared_head or s.shared_head_teacher
        return Pair(s.out_dim, s.out_dim if shared else s.patch_out_dim)

    @property
    def frozen_prototype_epochs(self) -> float:
        """The flag ``freeze_last_layer``."""
        return self.settings.freeze_last_layer


def _ranges(settings: IBOTSettings) -> tuple[tuple[float, float, float], ...]:
    """Return the share of the crops of each ratio, and its range. Raise ValueError if they do not fit together."""
    ratios, halves = settings.pred_ratio, settings.pred_ratio_var
    halves = halves * len(ratios) if len(halves) == 1 else halves
    if len(halves) != len(ratios):
        raise ValueError(
            f"--pred_ratio_var: must have 1 number or one per --pred_ratio, {len(ratios)}, got {len(halves)}. "
            "Give both flags."
        )
    if any(half > ratio for ratio, half in zip(ratios, halves, strict=True)):
        raise ValueError(f"--pred_ratio_var: must be at most its --pred_ratio, got {halves} for {ratios}.")
    return tuple((1 / len(ratios), ratio - half, ratio + half) for ratio, half in zip(ratios, halves, strict=True))
