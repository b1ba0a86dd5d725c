"""BYOL: Bootstrap Your Own Latent (arXiv 2006.07733)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..flags import Count, Fraction, Several, flag
from ..kernels.normalize import normalize_rows
from ..losses import BYOLLoss
from ..losses.base import other_pairs
from ..models.heads import projection_mlp
from ..models.teacher import make_teacher
from .base import Objective, Step, Task
from .bound import SphereMethod, SphereSettings
from .branch import Branch, Network, predict, slice_views, width_of
from .registry import register


@dataclass(frozen=True)
class BYOLSettings(SphereSettings):
    """BYOL's settings, as in its official code for ResNet-50 at batch 4096."""

    hidden_dim: Count = flag(4096, "width of the hidden layer of projection head and predictor")
    out_dim: Several = flag(256, "dimension of the projection")
    momentum_teacher: Fraction = flag(0.996, "momentum of the target network at the start")
    momentum_teacher_end: Fraction = flag(1.0, "momentum of the target network at the end (cosine schedule)")
    entropy_of: Literal["prediction", "projection"] = flag("prediction", "the variable whose entropy the twin raises")


@register("byol")
class BYOL(SphereMethod):
    """Predict an EMA network's projection of the other view; the twin adds the entropy of the trained variable."""

    Settings = BYOLSettings
    settings: BYOLSettings
    family = "distillation"
    has_teacher = True

    def __init__(self, network: Network, settings: BYOLSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        hidden, out = settings.hidden_dim, settings.out_dim
        self.student = Branch(backbone, _head(width_of(backbone), hidden, out), views_apart=True)
        self.predictor = _head(out, hidden, out)
        self.teacher = make_teacher(self.student)
        self.loss = BYOLLoss()

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return ``2 - 2 cos``, summed over both directions (equations 2 and 3), mean over pairs; or the twin's."""
        projections = self.student.projections(views)
        predictions = predict(self.predictor, projections)
        with torch.no_grad():
            targets = self.teacher.projections(slice_views(views, 0, self.n_global))

        def twin() -> Objective:
            z = normalize_rows(predictions)
            variables = z if self.settings.entropy_of == "prediction" else normalize_rows(projections)
            return self.sphere_objective(variables, other_pairs(z, normalize_rows(targets)), step)

        return self.objective(step, lambda: self.loss.views(predictions, targets), twin)


def _head(width: int, hidden: int, out: int) -> nn.Sequential:
    """Build Linear, BatchNorm, ReLU, Linear. As in the official code, only the first layer has a bias."""
    head = projection_mlp((width, hidden, out), biases=False)
    head[0] = nn.Linear(width, hidden)
    return head
