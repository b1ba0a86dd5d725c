"""The definition in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_similarity(x: Tensor, y: Tensor, excluded: int | None) -> tuple[Tensor, Tensor]:
    """Return the maximum over j of ``<x_i, y_j>`` [N] and its j [N], for x [N, D] and y [M, D].

    Row i leaves out j = i + excluded.
    """
    with torch.autocast(x.device.type, enabled=False):
        scores = x @ y.T
    if excluded is not None:
        own = torch.ones_like(scores, dtype=torch.bool).tril(excluded).triu(excluded)
        scores = scores.masked_fill(own, -torch.inf)
    values, places = scores.max(1)
    return values, places
