"""DINO: Emerging Properties in Self-Supervised Vision Transformers (arXiv 2104.14294)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..flags import Count, Fraction, NonNegative, Positive, Several, flag
from ..losses import DINOLoss
from ..models.heads import Prototypes, projection_mlp, trunc_normal_linears
from ..models.teacher import make_teacher
from .base import Objective, PerImages, Step, Task
from .bound import PrototypeMethod, in_product_dtype
from .branch import Branch, Network, slice_views, width_of
from .registry import register

PROTOTYPE_NORM = 3**-0.5  # the row norm of torch's Linear, to which the authors apply weight_norm


@dataclass(frozen=True)
class DINOSettings:
    """DINO's settings, with the names and defaults of facebookresearch/dino."""

    out_dim: Several = flag(65536, "number of prototypes")
    hidden_dim: Count = flag(2048, "width of the head's hidden layers")
    bottleneck_dim: Several = flag(256, "dimension in which projections meet the prototypes")
    use_bn_in_head: bool = flag(False, "BatchNorm after the head's hidden layers")
    use_bn_at_bottleneck: bool = flag(False, "BatchNorm on the projection too, which keeps all its dimensions in use")
    norm_last_layer: bool = flag(True, "keep the prototypes' norm at 1")
    momentum_teacher: Fraction = flag(0.996, "momentum of the teacher at the start")
    momentum_teacher_end: Fraction = flag(1.0, "momentum of the teacher at the end (cosine schedule)")
    student_temp: Positive = flag(0.1, "temperature of the student")
    warmup_teacher_temp: Positive = flag(0.04, "temperature of the teacher at the start")
    teacher_temp: Positive = flag(0.04, "temperature of the teacher after its warm-up")
    warmup_teacher_temp_epochs: NonNegative = flag(0.0, "epochs of the teacher temperature's warm-up")
    freeze_last_layer: NonNegative = flag(1.0, "epochs during which the prototypes are frozen")
    center_momentum: Fraction = flag(0.9, "momentum of the centre of the teacher's logits")
    no_centering: bool = flag(False, "do not centre the teacher's logits (collapses without --entropy)")


@register("dino")
class DINO(PrototypeMethod):
    """Self-distillation over prototypes; the twin adds the entropy that centring otherwise maintains."""

    Settings = DINOSettings
    settings: DINOSettings
    sized = MappingProxyType({"out_dim": PerImages(8, 256, 65_536)})
    family = "distillation"
    has_teacher = True
    zero_init_residual = False

    def __init__(self, network: Network, settings: DINOSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dims = (width_of(backbone), settings.hidden_dim, settings.hidden_dim, settings.bottleneck_dim)
        head = projection_mlp(
            dims,
            batch_norm=settings.use_bn_in_head,
            last_norm="batch" if settings.use_bn_at_bottleneck else "none",
            activation=nn.GELU,
        )
        trunc_normal_linears(head)
        prototypes = Prototypes(
            settings.bottleneck_dim, settings.out_dim, learn_norm=not settings.norm_last_layer, start=PROTOTYPE_NORM
        )
        self.student = Branch(backbone, head, prototypes)
        self.teacher = make_teacher(self.student)
        self.loss = DINOLoss(
            settings.out_dim,
            settings.warmup_teacher_temp,
            settings.teacher_temp,
            settings.warmup_teacher_temp_epochs,
            settings.student_temp,
            settings.center_momentum,
            center_mode="none" if settings.no_centering else "mean",
        )

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the cross-entropy of every student view with the teacher's other global views, or the twin's."""
        student, prototypes = self.student(views), self.student.prototypes()
        with torch.no_grad():
            teacher = self.teacher(slice_views(views, 0, self.n_global))
            teacher_prototypes = self.teacher.prototypes()
        measure = self.entropy or step.measure
        reconstruction, entropy = self.loss.terms(
            *in_product_dtype(student, teacher, prototypes, teacher_prototypes),
            teacher_temp=self.teacher_temp(step),
            entropy=measure,
        )
        self.loss.update_center(teacher, teacher_prototypes=teacher_prototypes)
        return self.prototype_objective(reconstruction, entropy if measure else None, student, step)

    def teacher_temp(self, step: Step) -> float:
        """Return the teacher's temperature at a step."""
        return self.loss.teacher_temp_at(int(step.epoch))

    @property
    def prototype_count(self) -> int:
        """The number of prototypes."""
        return self.settings.out_dim

    @property
    def frozen_prototype_epochs(self) -> float:
        """DINO's ``freeze_last_layer``."""
        return self.settings.freeze_last_layer
