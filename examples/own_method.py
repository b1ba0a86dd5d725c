"""Add a method outside the package: alignment and uniformity (Wang & Isola 2020, arXiv 2005.10242).

    fasttrain train --method own --plugin examples/own_method.py
    python examples/own_method.py

It logs two scalars of its own and has no entropy-reconstruction bound. It uses SimCLR's recipes (views, schedule).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasttrain.flags import Count, NonNegative, Positive, flag
from fasttrain.methods import Branch, Method, Network, Objective, Step, Task, register


@dataclass(frozen=True)
class OwnSettings:
    """Each field is a flag, a YAML key and a keyword of ``fasttrain.train``."""

    out_dim: Count = flag(64, "dimension of the projection")
    sharpness: Positive = flag(2.0, "factor of the squared distances in the uniformity")
    uniformity_weight: NonNegative = flag(1.0, "weight of the uniformity")


@register("own")
class Own(Method):
    """Pulls two views of an image together, and spreads all images over the sphere."""

    Settings = OwnSettings
    recipes = "simclr"

    def __init__(self, network: Network, settings: OwnSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        width = int(backbone.num_features)
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, settings.out_dim))
        self.student = Branch(backbone, head)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the loss of the first two views, unit-norm rows z [V, B, D]."""
        z = self.student(views)
        alignment = (z[0] - z[1]).square().sum(1).mean()
        uniformity = torch.stack([self.uniformity(view) for view in z[:2]]).mean()
        loss = alignment + self.settings.uniformity_weight * uniformity
        logs = {"alignment": alignment.detach(), "uniformity": uniformity.detach()}
        return Objective(loss, projections=z.detach().flatten(0, 1), logs=logs)

    def uniformity(self, z: Tensor) -> Tensor:
        """Return ``log mean exp(-sharpness |z_i - z_j|^2)`` over all pairs of rows (equation 4)."""
        exponents = -self.settings.sharpness * torch.pdist(z).square()
        return exponents.logsumexp(0) - math.log(len(exponents))


if __name__ == "__main__":
    import fasttrain

    result = fasttrain.train("own", limit_steps=20, log_every=5)
    print(result, {name: round(result.metrics[-1][name], 3) for name in ("alignment", "uniformity")})
