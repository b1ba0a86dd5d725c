"""The definition in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .quadrature import knots_and_weights


def characteristic_sums(z: Tensor, slices: Tensor, knots: int, limit: float) -> Tensor:
    """Return ``sum_n cos(t_k p_n)`` and ``sum_n sin(t_k p_n)``, [V, 2, knots - 1, S], of ``p = z slices``.

    z is [V, N, D], slices [D, S], and t_k the knots k = 1 to knots - 1 of [0, limit].
    """
    with torch.autocast(z.device.type, enabled=False):
        projections = z @ slices.to(z.dtype)
    t, _, _ = knots_and_weights(knots, limit, projections)
    angles = projections[:, :, None] * t[:, None]
    return torch.stack([angles.cos().sum(1), angles.sin().sum(1)], dim=1)
