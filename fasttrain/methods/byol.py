"""BYOL: Bootstrap Your Own Latent (arXiv 2006.07733)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..flags import flag
from ..kernels.normalize import normalize_rows
from ..models.heads import projection_mlp
from ..models.teacher import make_teacher
from . import bound
from .base import Branch, Method, Network, Objective, Step, Task, other_pairs, slice_views, unit_predictions, width_of


@dataclass(frozen=True)
class BYOLSettings(bound.SphereSettings):
    """BYOL's own settings, as in its official code for ResNet-50 at batch 4096."""

    hidden_dim: int = flag(4096, "width of the hidden layer of projection head and predictor", least=1)
    out_dim: int = flag(256, "dimension of the projection", least=1)
    momentum_teacher: float = flag(0.996, "the target network's momentum at the start", least=0, most=1)
    momentum_teacher_end: float = flag(1.0, "the target network's momentum at the end (cosine)", least=0, most=1)
    entropy_of: Literal["prediction", "projection"] = flag(
        "prediction", "of which variable the twin raises the entropy"
    )


class BYOL(Method):
    """Predict an EMA network's projection of the other view; the twin adds the entropy of what carries gradient."""

    Settings = BYOLSettings
    settings: BYOLSettings

    def __init__(self, network: Network, settings: BYOLSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        hidden, out = settings.hidden_dim, settings.out_dim
        self.student = Branch(backbone, _head(width_of(backbone), hidden, out), views_apart=True)
        self.predictor = _head(out, hidden, out)
        self.teacher = make_teacher(self.student)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """``2 - 2 cos``, summed over the two directions and averaged over pairs and images (equations 2 and 3)."""
        projections = self.student.projections(views)
        predictions = unit_predictions(self.predictor, projections)
        with torch.no_grad():
            targets = self.teacher(slice_views(views, 0, self.n_global))
        pairs = other_pairs(predictions, targets)
        variables = predictions if self.settings.entropy_of == "prediction" else normalize_rows(projections)
        return self.objective(
            step,
            lambda: 4 - 4 * torch.stack([(p * t).sum(1).mean() for p, t in pairs]).mean(),
            lambda: bound.sphere(variables, pairs, self.settings, group=self.group, measure=step.measure),
        )


def _head(width: int, hidden: int, out: int) -> torch.nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear; as in the official code the first has a bias and the last has none."""
    head = projection_mlp((width, hidden, out), biases=False)
    head[0] = torch.nn.Linear(width, hidden)
    return head
