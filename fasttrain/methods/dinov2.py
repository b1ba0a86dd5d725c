"""DINOv2: Learning Robust Visual Features without Supervision (arXiv 2304.07193)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..flags import Count, Fraction, NonNegative, Positive, PositiveFraction, Several, flag
from ..kernels import prototype_sinkhorn_center
from ..losses import DINOLoss, GramLoss, KoLeoLoss, iBOTPatchLoss
from ..losses.dino import warmup_temperature
from ..models.heads import Prototypes
from ..models.teacher import ema_update, make_teacher
from ..models.tokens import tokens_of
from .base import PerImages, Step, Task
from .branch import Network, width_of
from .dino import PROTOTYPE_NORM
from .masked import MaskedMethod, Pair, TokenBranch, dino_head
from .masks import Masking
from .registry import register

_ITERATIONS = 3  # of Sinkhorn, fixed in the authors' code
_LEAST = 4  # patches of a block, fixed in the authors' code


@dataclass(frozen=True)
class DINOv2Settings:
    """DINOv2's settings, as in facebookresearch/dinov2; the defaults are the ones of its longer run (ViT-L, IN-22k)."""

    head_n_prototypes: Several = flag(131072, "number of prototypes of [CLS]")
    head_hidden_dim: Count = flag(2048, "width of the hidden layers of the head of [CLS]")
    head_bottleneck_dim: Several = flag(384, "dimension in which projections of [CLS] meet the prototypes")
    separate_head: bool = flag(True, "the patches have a head and prototypes of their own")
    ibot_head_n_prototypes: Several = flag(131072, "number of prototypes of the patches' own head")
    ibot_head_hidden_dim: Count = flag(2048, "width of the hidden layers of the patches' own head")
    ibot_head_bottleneck_dim: Several = flag(256, "dimension in which patches of their own head meet the prototypes")
    norm_last_layer: bool = flag(False, "keep the prototypes' norm at 1")
    dino_loss_weight: NonNegative = flag(1.0, "weight of the loss of [CLS]")
    ibot_loss_weight: NonNegative = flag(1.0, "weight of the loss of masked patches")
    koleo_loss_weight: NonNegative = flag(0.1, "weight of KoLeo on [CLS] per global crop; not in the twin")
    centering: Literal["centering", "sinkhorn_knopp", "none"] = flag(
        "sinkhorn_knopp", "the teacher's centring: a moving mean, Sinkhorn, or none (collapses without --entropy)"
    )
    mask_sample_probability: PositiveFraction = flag(0.5, "fraction of the global crops that are masked")
    mask_ratio_min_max: tuple[Fraction, Fraction] = flag((0.1, 0.5), "fraction of masked patches in them: MIN MAX")
    momentum_teacher: Fraction = flag(0.994, "momentum of the teacher at the start")
    momentum_teacher_end: Fraction = flag(1.0, "momentum of the teacher at the end (cosine schedule)")
    student_temp: Positive = flag(0.1, "temperature of the student")
    warmup_teacher_temp: Positive = flag(0.04, "temperature of the teacher at the start")
    teacher_temp: Positive = flag(0.07, "temperature of the teacher after its warm-up")
    warmup_teacher_temp_epochs: NonNegative = flag(30.0, "epochs of the teacher temperature's warm-up")
    freeze_last_layer_epochs: NonNegative = flag(1.0, "epochs during which the prototypes are frozen")
    center_momentum: Fraction = flag(0.9, "momentum of the centres of the teacher's logits")
    gram_loss_weight: NonNegative = flag(
        0.0, "DINOv3: weight of Gram anchoring, which keeps the patches' similarities as in an earlier network"
    )
    gram_start_epoch: NonNegative = flag(0.0, "epoch at which Gram anchoring starts")
    gram_update_epochs: NonNegative = flag(
        0.0, "epochs between copies of the teacher into the Gram teacher; 0: it keeps the weights of the run's start"
    )


@register("dinov2")
class DINOv2(MaskedMethod):
    """iBOT with separate heads, Sinkhorn and KoLeo; the twin has the entropies of both heads in place of those."""

    Settings = DINOv2Settings
    settings: DINOv2Settings
    sized = MappingProxyType(
        {"head_n_prototypes": PerImages(8, 256, 65_536), "ibot_head_n_prototypes": PerImages(8, 256, 65_536)}
    )

    def __init__(self, network: Network, settings: DINOv2Settings, task: Task) -> None:
        s, backbone = settings, network(task.views.channels)
        share, (low, high) = s.mask_sample_probability, s.mask_ratio_min_max
        ranges = ((1 - share, 0.0, 0.0), (share, low, high))
        super().__init__(s, task, backbone, Masking("mask_ratio_min_max", ranges, least=_LEAST))
        width = width_of(backbone)

        def prototypes(dim: int, count: int) -> Prototypes:
            return Prototypes(dim, count, learn_norm=not s.norm_last_layer, start=PROTOTYPE_NORM)

        head = dino_head(width, s.head_hidden_dim, s.head_bottleneck_dim)
        rows = prototypes(s.head_bottleneck_dim, s.head_n_prototypes)
        if s.separate_head:
            patch_head = dino_head(width, s.ibot_head_hidden_dim, s.ibot_head_bottleneck_dim)
            patch_rows = prototypes(s.ibot_head_bottleneck_dim, s.ibot_head_n_prototypes)
            self.student = TokenBranch(backbone, {"cls": head, "patch": patch_head}, {"cls": rows, "patch": patch_rows})
        else:
            self.student = TokenBranch(backbone, head, rows)
        self.teacher = make_teacher(self.student)
        counts = self.prototype_counts()
        options: dict[str, Any] = {
            "student_temp": s.student_temp,
            "center_momentum": s.center_momentum,
            "center_mode": "mean" if s.centering == "centering" else "none",
        }
        self.loss = DINOLoss(counts.cls, **options)
        self.patch_loss = iBOTPatchLoss(counts.patch, **options)
        self.koleo_loss, self.gram_loss = KoLeoLoss(), GramLoss(remove_neg=False)
        self.gram_teacher: Any = make_teacher(backbone) if s.gram_loss_weight else None
        if s.gram_loss_weight and not (task.has_weights or s.gram_update_epochs):
            raise ValueError(
                "--gram_loss_weight: would anchor the patches to random weights. Give weights with --init_from, or "
                "copy the teacher with --gram_update_epochs and --gram_start_epoch."
            )

    @classmethod
    def check(cls, settings: Any, batch: int) -> None:
        """Raise ValueError for a range of masks in the wrong order."""
        low, high = settings.mask_ratio_min_max
        if low > high:
            raise ValueError(f"--mask_ratio_min_max: must be MIN MAX, got {low} {high}. Swap them.")

    def temperatures(self, step: Step) -> Pair:
        """Return the teacher's temperature, which changes from step to step."""
        s = self.settings
        steps = s.warmup_teacher_temp_epochs * step.per_epoch
        temp = warmup_temperature(step.position, steps, s.warmup_teacher_temp, s.teacher_temp)
        return Pair(temp, temp)

    def term_weights(self) -> Pair:
        """Return ``dino_loss_weight`` and ``ibot_loss_weight``."""
        return Pair(self.settings.dino_loss_weight, self.settings.ibot_loss_weight)

    def prototype_counts(self) -> Pair:
        """Return the prototypes of the two heads, or of the shared one."""
        s = self.settings
        return Pair(s.head_n_prototypes, s.ibot_head_n_prototypes if s.separate_head else s.head_n_prototypes)

    def centers(self, teacher: Pair, prototypes: Pair, temperatures: Pair) -> Pair:
        """Return Sinkhorn's potentials over the [CLS] of all global crops and over all masked patches."""
        if self.settings.centering != "sinkhorn_knopp":
            return Pair(None, None)
        return Pair(
            *(
                prototype_sinkhorn_center(z, rows, epsilon=temp, iterations=_ITERATIONS, group=self.group)
                for z, rows, temp in zip(teacher, prototypes, temperatures, strict=True)
            )
        )

    def further_terms(
        self, features: Tensor, patches: Tensor, crops: Sequence[Tensor], step: Step
    ) -> dict[str, tuple[float, Tensor]]:
        """Return KoLeo of each global crop's features, summed over the crops, in fp32; and Gram anchoring."""
        s, terms = self.settings, dict[str, tuple[float, Tensor]]()
        if s.koleo_loss_weight and not self.entropy:
            terms["koleo"] = s.koleo_loss_weight, torch.stack([self.koleo_loss(view) for view in features]).sum()
        if self.gram_teacher is not None and step.epoch >= s.gram_start_epoch:
            terms["gram"] = s.gram_loss_weight, self._gram(patches, crops)
        return terms

    def _gram(self, patches: Tensor, crops: Sequence[Tensor]) -> Tensor:
        """Return the Gram loss of the global crops, which the Gram teacher sees whole, as the mean over the crops."""
        losses, start = [], 0
        for group, (views, (rows, columns)) in zip(crops, self.grids, strict=True):
            with torch.no_grad():
                targets = tokens_of(self.gram_teacher, group.flatten(0, 1)).patches
            count = targets.shape[0] * rows * columns
            own = patches[start : start + count].view_as(targets)
            losses.append(views / self.n_global * self.gram_loss(own, targets))
            start += count
        return torch.stack(losses).sum()

    def end_step(self, step: Step) -> None:
        """Update the teacher, and copy it into the Gram teacher if it is time."""
        super().end_step(step)
        if self.gram_teacher is not None and self._renews_gram(step):
            ema_update(self.gram_teacher, self.teacher.backbone, 0.0)

    def _renews_gram(self, step: Step) -> bool:
        """Return whether the Gram teacher is renewed after a step."""
        s = self.settings
        first, every = (round(epochs * step.per_epoch) for epochs in (s.gram_start_epoch, s.gram_update_epochs))
        since = step.position + 1 - first
        return every > 0 and since >= 0 and since % every == 0

    @property
    def backbones(self) -> list[nn.Module]:
        """The student's, the teacher's and, with Gram anchoring, the Gram teacher."""
        return super().backbones + ([] if self.gram_teacher is None else [self.gram_teacher])

    @property
    def frozen_prototype_epochs(self) -> float:
        """DINOv2's ``freeze_last_layer_epochs``."""
        return self.settings.freeze_last_layer_epochs
