"""VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning (arXiv 2105.04906)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..flags import Count, NonNegative, Several, flag
from ..losses import VICRegLoss
from ..models.heads import projection_mlp
from .base import Objective, Step, Task
from .branch import Branch, Network, width_of
from .registry import register
from .regularised import RegularisedMethod


@dataclass(frozen=True)
class VICRegSettings:
    """VICReg's settings, with the names and values of its official code for ResNet-50 at batch 2048."""

    hidden_dim: Count = flag(8192, "width of the expander's hidden layers")
    out_dim: Several = flag(8192, "dimension of the projection")
    sim_coeff: NonNegative = flag(25.0, "weight of the invariance")
    std_coeff: NonNegative = flag(25.0, "weight of the variance")
    cov_coeff: NonNegative = flag(1.0, "weight of the covariance")


@register("vicreg")
class VICReg(RegularisedMethod):
    """Equal projections of two views, whose features have a variance of 1 and no covariance over the batch."""

    Settings = VICRegSettings
    settings: VICRegSettings

    def __init__(self, network: Network, settings: VICRegSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dims = (width_of(backbone), settings.hidden_dim, settings.hidden_dim, settings.out_dim)
        self.student = Branch(backbone, projection_mlp(dims, biases=False), views_apart=True)
        self.loss = VICRegLoss(settings.sim_coeff, settings.std_coeff, settings.cov_coeff)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return equation 6, the mean over all pairs of views with at least one global view."""
        projections = self.student.projections(views)
        terms = self.loss.terms(projections, self.view_pairs(len(projections)))
        return self.regularised_objective(self.loss.weighted(terms), terms._asdict(), projections, step)
