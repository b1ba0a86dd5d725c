"""LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics (arXiv 2511.08544)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..flags import Count, Fraction, Positive, Several, flag
from ..losses import SIGRegLoss
from ..models.heads import projection_mlp
from .base import Objective, Step, Task
from .branch import Branch, Network, width_of
from .registry import register
from .regularised import RegularisedMethod


@dataclass(frozen=True)
class LeJEPASettings:
    """LeJEPA's settings, with the values of its authors' ImageNet scripts."""

    hidden_dim: Count = flag(2048, "width of the projection head's hidden layers")
    out_dim: Several = flag(512, "dimension of the projection")
    sigreg_weight: Fraction = flag(0.05, "lambda, the weight of SIGReg")
    sigreg_form: Literal["convex", "additive"] = flag(
        "convex", "convex: (1 - lambda) invariance + lambda SIGReg; additive: invariance + lambda SIGReg"
    )
    slices: Count = flag(1024, "random directions per step")
    knots: Several = flag(17, "knots of the integral over t")
    t_max: Positive = flag(3.0, "end of the integral over t")


@register("lejepa")
class LeJEPA(RegularisedMethod):
    """All views predict the mean of the global ones, and projections have the law N(0, I): SIGReg.

    The default is the form of the paper and of its minimal example, a convex combination. Other published code adds
    SIGReg to the whole invariance, which is the same up to a factor of the loss and another lambda.
    """

    Settings = LeJEPASettings
    settings: LeJEPASettings

    def __init__(self, network: Network, settings: LeJEPASettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dims = (width_of(backbone), settings.hidden_dim, settings.hidden_dim, settings.out_dim)
        self.student = Branch(backbone, projection_mlp(dims))
        self.loss = SIGRegLoss(knots=settings.knots, t_max=settings.t_max, num_vectors=settings.slices)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the invariance of all views and SIGReg of all views. The step's number determines the directions."""
        z = self.student.projections(views)
        invariance = (z - z[: self.n_global].mean(0)).square().mean()
        sigreg: Tensor = self.loss(z, seed=step.index)
        weight = self.settings.sigreg_weight
        own = 1 - weight if self.settings.sigreg_form == "convex" else 1.0
        terms = {"invariance": invariance, "sigreg": sigreg}
        return self.regularised_objective(own * invariance + weight * sigreg, terms, z, step)
