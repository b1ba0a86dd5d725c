"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (arXiv 2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flags import flag
from ..kernels import nt_xent
from ..models.heads import projection_mlp
from . import bound
from .base import Branch, Method, Network, Objective, Step, Task, width_of


@dataclass(frozen=True)
class SimCLRSettings(bound.SphereSettings):
    """SimCLR's own settings, as in the paper for ResNet-50 at batch 4096."""

    temperature: float = flag(0.1, "temperature of NT-Xent", above=0)
    hidden_dim: int = flag(2048, "width of the projection head's hidden layer", least=1)
    out_dim: int = flag(128, "dimension of the projection", least=1)


class SimCLR(Method):
    """NT-Xent between the views of an image; the entropy-reconstruction twin replaces it on the sphere.

    The mean over all rows, as in the paper's equation 1; the official code's loss is twice that.
    """

    Settings = SimCLRSettings
    settings: SimCLRSettings

    def __init__(self, network: Network, settings: SimCLRSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        dims = (width_of(backbone), settings.hidden_dim, settings.out_dim)
        self.student = Branch(backbone, projection_mlp(dims, last_norm="scaled"))

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Mean NT-Xent over all pairs of views of which one is global, or the entropy-reconstruction objective."""
        z = self.student(views)
        pairs = [(a, b) for i, a in enumerate(z[: self.n_global]) for b in z[i + 1 :]]
        return self.objective(
            step,
            lambda: torch.stack([self._nt_xent(a, b) for a, b in pairs]).mean(),
            lambda: bound.sphere(z, pairs, self.settings, group=self.group, measure=step.measure),
        )

    def _nt_xent(self, a: Tensor, b: Tensor) -> Tensor:
        return nt_xent(a, b, temperature=self.settings.temperature, group=self.group)
