"""DINO: Emerging Properties in Self-Supervised Vision Transformers (arXiv 2104.14294)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flags import flag
from ..kernels.collectives import mean_over_ranks
from ..models.heads import Prototypes, projection_mlp, trunc_normal_linears
from ..models.teacher import make_teacher
from ..optim.schedules import linear
from . import bound
from .base import Branch, Method, Network, Objective, Step, Task, slice_views, width_of


@dataclass(frozen=True)
class DINOSettings:
    """DINO's own settings, with the names and defaults of facebookresearch/dino."""

    out_dim: int = flag(65536, "number of prototypes", least=2)
    hidden_dim: int = flag(2048, "width of the head's hidden layers", least=1)
    bottleneck_dim: int = flag(256, "dimension in which projections meet the prototypes", least=1)
    use_bn_in_head: bool = flag(False, "BatchNorm after the head's hidden layers")
    use_bn_at_bottleneck: bool = flag(False, "BatchNorm on the projection too, which keeps all its dimensions in use")
    norm_last_layer: bool = flag(True, "keep the prototypes' norm at 1")
    momentum_teacher: float = flag(0.996, "the teacher's momentum at the start", least=0, most=1)
    momentum_teacher_end: float = flag(1.0, "the teacher's momentum at the end (cosine)", least=0, most=1)
    student_temp: float = flag(0.1, "temperature of the student", above=0)
    warmup_teacher_temp: float = flag(0.04, "temperature of the teacher at the start", above=0)
    teacher_temp: float = flag(0.04, "temperature of the teacher after its warm-up", above=0)
    warmup_teacher_temp_epochs: float = flag(0.0, "epochs of the teacher temperature's warm-up", least=0)
    freeze_last_layer: float = flag(1.0, "epochs during which the prototypes stay fixed", least=0)
    center_momentum: float = flag(0.9, "momentum of the centre of the teacher's logits", least=0, most=1)
    no_centering: bool = flag(False, "do not centre the teacher's logits (collapses, unless with --entropy)")


_START = 3**-0.5  # length of a row of torch's Linear, on which the authors lay weight_norm


class DINO(Method):
    """Self-distillation over prototypes; the entropy-reconstruction twin adds the entropy that centring stands for."""

    Settings = DINOSettings
    settings: DINOSettings
    zero_init_residual = False

    center: Tensor

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
            settings.bottleneck_dim, settings.out_dim, learn_norm=not settings.norm_last_layer, start=_START
        )
        self.student = Branch(backbone, head, prototypes)
        self.teacher = make_teacher(self.student)
        self.register_buffer("center", torch.zeros(settings.out_dim))

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Cross-entropy of every student view with the teacher's other global views."""
        student, prototypes = self.student(views), self.student.prototypes()
        with torch.no_grad():
            teacher = self.teacher(slice_views(views, 0, self.n_global))
            teacher_prototypes = self.teacher.prototypes()
        objective = bound.discrete(
            student,
            teacher,
            prototypes,
            teacher_prototypes,
            student_temp=self.settings.student_temp,
            teacher_temp=self.teacher_temp(step),
            center=None if self.settings.no_centering else self.center,
            group=self.group,
            twin=self.entropy,
            measure=step.measure,
        )
        if not self.settings.no_centering:
            self._update_center(teacher, teacher_prototypes)
        return objective

    @torch.no_grad()
    def _update_center(self, teacher: Tensor, prototypes: Tensor) -> None:
        """Move the centre to the batch's mean logit, which is the prototypes times the mean projection: no logits."""
        mean = mean_over_ranks(teacher.mean((0, 1)), self.group)
        with torch.autocast(mean.device.type, enabled=False):  # a product in bf16 would not even go into the centre
            self.center.lerp_(prototypes @ mean, 1 - self.settings.center_momentum)

    def teacher_temp(self, step: Step) -> float:
        """The teacher's temperature: W values from the first to the last, one for each of the W epochs of warm-up."""
        s = self.settings
        if int(step.epoch) == 0 and s.warmup_teacher_temp_epochs > 0:  # with W = 1 the first is the only one
            return s.warmup_teacher_temp
        return linear(int(step.epoch), s.warmup_teacher_temp_epochs - 1, s.warmup_teacher_temp, s.teacher_temp)

    @property
    def frozen_prototype_epochs(self) -> float:
        """DINO's ``freeze_last_layer``."""
        return self.settings.freeze_last_layer
