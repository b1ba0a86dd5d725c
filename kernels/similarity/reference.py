"""The definition, in plain torch: what every faster path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def row_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    exclude_self: bool = False,
    first_row: int = 0,
) -> Tensor:
    """``lse_i = log sum_j exp(scale <x_i, y_j> + bias_j)`` for x [N, D] and y [M, D]; returns [N].

    With ``exclude_self`` the sum leaves out j = first_row + i: row i of x is then row ``first_row + i`` of y,
    as it is when x holds one rank's rows of the gathered y. A row with nothing left to sum is -inf.
    """
    # Autocast would round the similarities to 8 bits before they are scaled and exponentiated.
    with torch.autocast(x.device.type, enabled=False):
        scores = scale * (x @ y.T)
    if bias is not None:
        scores = scores + bias
    if exclude_self:
        rows = torch.arange(len(x), device=x.device)
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[rows, rows + first_row] = True
        scores = scores.masked_fill(own, -torch.inf)
    return scores.logsumexp(1)
