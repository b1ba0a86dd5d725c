"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (arXiv 2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..flags import Count, Positive, Several, flag
from ..kernels.normalize import normalize_rows
from ..losses import NTXentLoss
from ..models.heads import projection_mlp
from .base import Objective, Step, Task
from .bound import SphereMethod, SphereSettings
from .branch import Branch, Network, width_of
from .registry import register


@dataclass(frozen=True)
class SimCLRSettings(SphereSettings):
    """SimCLR's settings, as in the paper for ResNet-50 at batch 4096."""

    temperature: Positive = flag(0.1, "temperature of NT-Xent")
    hidden_dim: Count = flag(2048, "width of the projection head's hidden layer")
    out_dim: Several = flag(128, "dimension of the projection")


@register("simclr")
class SimCLR(SphereMethod):
    """NT-Xent between the views of an image; the twin replaces it by the bound on the sphere.

    The loss is the mean over all rows, as in the paper's equation 1. The official code's loss is twice that.
    """

    Settings = SimCLRSettings
    settings: SimCLRSettings
    family = "contrastive"

    def __init__(self, network: Network, settings: SimCLRSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dims = (width_of(backbone), settings.hidden_dim, settings.out_dim)
        self.student = Branch(backbone, projection_mlp(dims, last_norm="scaled"))
        self.loss = NTXentLoss(settings.temperature)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the mean NT-Xent over all pairs of views with at least one global view, or the twin's objective."""
        projections = self.student.projections(views)
        pairs = [(i, j) for i in range(self.n_global) for j in range(i + 1, len(projections))]

        def twin() -> Objective:
            z = normalize_rows(projections)
            return self.sphere_objective(z, [(z[i], z[j]) for i, j in pairs], step)

        return self.objective(step, lambda: self.loss.pairs(projections, pairs), twin)
