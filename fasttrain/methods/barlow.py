"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (arXiv 2103.03230)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..flags import Count, NonNegative, Positive, Several, flag
from ..losses import BarlowTwinsLoss
from ..models.heads import projection_mlp
from ..optim.optimizers import ParameterRule
from .base import Objective, Step, Task
from .branch import Branch, Network, width_of
from .registry import register
from .regularised import RegularisedMethod


@dataclass(frozen=True)
class BarlowSettings:
    """The settings of Barlow Twins, with the values of its official code for ResNet-50 at batch 2048."""

    hidden_dim: Count = flag(8192, "width of the projection head's hidden layers")
    out_dim: Several = flag(8192, "dimension of the projection")
    lambd: NonNegative = flag(0.0051, "weight of the redundancy, the correlations between different features")
    bias_lr_scale: Positive = flag(1.0, "factor of the learning rate of biases and norms")


@register("barlow")
class Barlow(RegularisedMethod):
    """The cross-correlation of the projections of two views is the identity."""

    Settings = BarlowSettings
    settings: BarlowSettings

    def __init__(self, network: Network, settings: BarlowSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dims = (width_of(backbone), settings.hidden_dim, settings.hidden_dim, settings.out_dim)
        self.student = Branch(backbone, projection_mlp(dims, biases=False), views_apart=True)
        self.loss = BarlowTwinsLoss(settings.lambd)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return equation 1, the mean over all pairs of views with at least one global view."""
        projections = self.student.projections(views)
        terms = self.loss.terms(projections, self.view_pairs(len(projections)))
        return self.regularised_objective(self.loss.weighted(terms), terms._asdict(), projections, step)

    def parameter_rule(self, name: str, parameter: nn.Parameter, *, decay_all: bool = False) -> ParameterRule:
        """Scale the learning rate of biases and norms, as in the official code."""
        rule = super().parameter_rule(name, parameter, decay_all=decay_all)
        if parameter.ndim > 1:
            return rule
        return replace(rule, lr_scale=rule.lr_scale * self.settings.bias_lr_scale)
