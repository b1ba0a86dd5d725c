"""SimSiam: Exploring Simple Siamese Representation Learning (arXiv 2011.10566)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flags import flag
from ..kernels.normalize import normalize_rows
from ..models.heads import projection_mlp
from . import bound
from .base import Branch, Method, Network, Objective, Step, Task, other_pairs, unit_predictions, width_of


@dataclass(frozen=True)
class SimSiamSettings(bound.SphereSettings):
    """SimSiam's own settings, as in its official code for ResNet-50."""

    dim: int = flag(2048, "width of the projection head, and dimension of the projection", least=1)
    pred_dim: int = flag(512, "width of the predictor's hidden layer", least=1)
    fix_pred_lr: bool = flag(True, "keep the predictor's learning rate at its peak")


class SimSiam(Method):
    """Predict the other view's projection, no gradient to the target; the twin adds the predictions' entropy."""

    Settings = SimSiamSettings
    settings: SimSiamSettings

    def __init__(self, network: Network, settings: SimSiamSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dim = settings.dim
        self.student = Branch(
            backbone, projection_mlp((width_of(backbone), dim, dim, dim), last_norm="plain"), views_apart=True
        )
        self.predictor = projection_mlp((dim, settings.pred_dim, dim))
        if settings.fix_pred_lr:
            self.constant_lr_modules = frozenset({"predictor"})

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """``-mean cos(prediction, projection of another global view)``, equation 2 for two views; or its twin."""
        projections = self.student.projections(views)
        predictions = unit_predictions(self.predictor, projections)
        targets = normalize_rows(projections[: self.n_global].detach())
        pairs = other_pairs(predictions, targets)
        return self.objective(
            step,
            lambda: -torch.stack([(p * t).sum(1).mean() for p, t in pairs]).mean(),
            lambda: bound.sphere(predictions, pairs, self.settings, group=self.group, measure=step.measure),
        )
