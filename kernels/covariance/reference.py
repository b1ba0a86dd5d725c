"""The definition in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def covariance_norms(z: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares of ``C = z^T other`` and the diagonal of C, for both [V, N, D]: [V] and [V, D]."""
    with torch.autocast(z.device.type, enabled=False):
        c = z.mT @ other
    return c.square().sum((1, 2)), c.diagonal(dim1=1, dim2=2)
