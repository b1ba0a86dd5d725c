"""The definitions in plain torch. Every faster path is tested against them."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled_similarities(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """Return ``scale <x_i, y_j>`` [N, M], outside of autocast, which would round to 8 bits before the exponential."""
    with torch.autocast(x.device.type, enabled=False):
        return scale * (x @ y.T)


def row_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    excluded: int | None = None,
) -> Tensor:
    """Return ``lse_i = log sum_j exp(scale <x_i, y_j> + bias_j)`` [N], for x [N, D] and y [M, D].

    The sum of row i leaves out j = i + excluded. This is the row itself if x is one rank's part of the gathered y. A
    row with an empty sum is -inf.
    """
    scores = scaled_similarities(x, y, scale)
    if bias is not None:
        scores = scores + bias
    if excluded is not None:
        own = torch.ones_like(scores, dtype=torch.bool).tril(excluded).triu(excluded)
        scores = scores.masked_fill(own, -torch.inf)
    return scores.logsumexp(1)


def bidirectional_logsumexp(x: Tensor, y: Tensor, *, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log sum_j exp(scale <x_i, y_j>)`` [N] and ``log sum_i exp(scale <x_i, y_j>)`` [M]."""
    scores = scaled_similarities(x, y, scale)
    return scores.logsumexp(1), scores.logsumexp(0)
