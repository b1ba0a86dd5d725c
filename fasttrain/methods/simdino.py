"""SimDINO: Simplifying DINO via Coding Rate Regularization (arXiv 2502.10385)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flags import Count, Fraction, NonNegative, Positive, Several, flag
from ..losses import SimDINOLoss
from ..losses.base import other_pairs
from ..models.heads import projection_mlp, trunc_normal_linears
from ..models.teacher import make_teacher
from .base import Objective, Step, Task
from .bound import SphereMethod, SphereSettings
from .branch import Branch, Network, slice_views, width_of
from .registry import register


@dataclass(frozen=True)
class SimDINOSettings(SphereSettings):
    """SimDINO's settings, as in its official code and the command of its README."""

    hidden_dim: Count = flag(2048, "width of the head's hidden layers")
    bottleneck_dim: Several = flag(256, "dimension of the projection")
    use_bn_in_head: bool = flag(False, "BatchNorm after the head's hidden layers")
    coeff: NonNegative = flag(1.0, "weight of the cosine, next to the coding rate")
    eps: Positive = flag(0.05, "noise of the coding rate; larger values count near directions as one")
    smooth: bool = flag(True, "coding rate of the mean of student and teacher, not of the student alone")
    momentum_teacher: Fraction = flag(0.996, "momentum of the teacher at the start")
    momentum_teacher_end: Fraction = flag(1.0, "momentum of the teacher at the end (cosine schedule)")


@register("simdino")
class SimDINO(SphereMethod):
    """Self-distillation without prototypes; the twin has the kernel entropy in place of the coding rate."""

    Settings = SimDINOSettings
    settings: SimDINOSettings
    family = "distillation"
    has_teacher = True
    zero_init_residual = False

    def __init__(self, network: Network, settings: SimDINOSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dims = (width_of(backbone), settings.hidden_dim, settings.hidden_dim, settings.bottleneck_dim)
        head = projection_mlp(dims, batch_norm=settings.use_bn_in_head, activation=nn.GELU)
        trunc_normal_linears(head)
        self.student = Branch(backbone, head)
        self.teacher = make_teacher(self.student)
        self.loss = SimDINOLoss(settings.coeff, settings.eps, smooth=settings.smooth)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return minus cosine and coding rate, or the twin's objective on the student's global views."""
        student = self.student(views)
        with torch.no_grad():
            teacher = self.teacher(slice_views(views, 0, self.n_global))

        def twin() -> Objective:
            return self.sphere_objective(student[: self.n_global], other_pairs(student, teacher), step)

        if self.entropy:
            return twin()
        cosine, spread = self.loss.terms(teacher, student)
        own = self.objective(step, lambda: self.loss.weighted(cosine, spread), twin)
        return own._replace(logs={**own.logs, "cosine": cosine.detach(), "coding_rate": spread.detach()})
