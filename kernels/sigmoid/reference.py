"""The definition in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid_loss(x: Tensor, y: Tensor, scale: float | Tensor, bias: float | Tensor, first: int) -> Tensor:
    """Return ``-sum_ij log sigmoid(l_ij (scale <x_i, y_j> + bias))`` for x [N, D] and y [M, D].

    l_ij is 1 for j = i + first, and -1 for all other pairs.
    """
    with torch.autocast(x.device.type, enabled=False):
        scores = scale * (x @ y.T) + bias
    own = torch.ones_like(scores, dtype=torch.bool).tril(first).triu(first)
    return -logsigmoid(torch.where(own, scores, -scores)).sum()
