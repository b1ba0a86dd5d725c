"""SimSiam: Exploring Simple Siamese Representation Learning (arXiv 2011.10566)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..flags import Count, Several, flag
from ..kernels.normalize import normalize_rows
from ..losses import SimSiamLoss
from ..losses.base import other_pairs
from ..models.heads import projection_mlp
from .base import Objective, Step, Task
from .bound import SphereMethod, SphereSettings
from .branch import Branch, Network, predict, width_of
from .registry import register


@dataclass(frozen=True)
class SimSiamSettings(SphereSettings):
    """SimSiam's settings, as in its official code for ResNet-50."""

    dim: Several = flag(2048, "width of the projection head, and dimension of the projection")
    pred_dim: Count = flag(512, "width of the predictor's hidden layer")
    fix_pred_lr: bool = flag(True, "keep the predictor's learning rate at its peak")


@register("simsiam")
class SimSiam(SphereMethod):
    """Predict the projection of the other view, without a gradient to it; the twin adds the predictions' entropy."""

    Settings = SimSiamSettings
    settings: SimSiamSettings
    family = "distillation"

    def __init__(self, network: Network, settings: SimSiamSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dim = settings.dim
        head = projection_mlp((width_of(backbone), dim, dim, dim), last_norm="plain")
        self.student = Branch(backbone, head, views_apart=True)
        self.predictor = projection_mlp((dim, settings.pred_dim, dim))
        self.loss = SimSiamLoss()
        if settings.fix_pred_lr:
            self.constant_lr_modules = frozenset({"predictor"})

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the mean over pairs of minus the cosine of prediction and target (equation 2), or the twin's."""
        projections = self.student.projections(views)
        predictions = predict(self.predictor, projections)
        targets = projections[: self.n_global].detach()

        def twin() -> Objective:
            z = normalize_rows(predictions)
            return self.sphere_objective(z, other_pairs(z, normalize_rows(targets)), step)

        return self.objective(step, lambda: self.loss.views(predictions, targets), twin)
