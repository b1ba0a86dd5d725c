"""The CPU path: tiles of scores, which stay in the cache. The gradient is summed in the forward pass.

    s_ij = scale <x_i, y_j> + bias
    loss = sum_ij softplus(s_ij),     G_ij = sigmoid(s_ij)       for all pairs but j = i + first
           + sum_i softplus(-s_ij),   G_ij = -sigmoid(-s_ij)     for these

The loss is a number, so its gradients are these sums times one factor, which the backward pass knows:

    dL/dx = scale G y,    dL/dy = scale G^T x,    dL/dscale = <x, G y>,    dL/dbias = sum_ij G_ij

That takes three products instead of four, and one sigmoid. The own pairs are inside of G. If they were subtracted from
the sums, little would be left of a well-fitted loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..precision import at_least_single
from ..spans import equal_spans

_TILE = 768
_LINEAR = 40.0  # above, softplus(s) is s to the last bit of fp64

Terms = tuple[Tensor, Tensor, Tensor, Tensor]


def terms(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, first: int, need_x: bool, need_y: bool) -> Terms:
    """Return the loss, sum G, G y [N, D] and G^T x [M, D]. Those not needed are empty; sum G comes with either."""
    x, y = at_least_single(x), at_least_single(y)
    factor, offset = float(scale), float(bias)
    loss, total = x.new_zeros(()), x.new_zeros(())
    of_x, of_y = x.new_zeros(x.shape if need_x else 0), y.new_zeros(y.shape if need_y else 0)
    row_spans, col_spans = equal_spans(len(x), _TILE), equal_spans(len(y), _TILE)
    buffer = x.new_empty(row_spans[0].stop * col_spans[0].stop)
    for i in row_spans:
        for j in col_spans:
            height, width = i.stop - i.start, j.stop - j.start
            tile = buffer[: height * width].view(height, width)
            torch.mm(x[i], y[j].T, out=tile)  # autocast does not change calls with out=
            tile.mul_(factor).add_(offset)
            diagonal = i.start + first - j.start
            own = tile.diagonal(diagonal) if -height < diagonal < width else tile[:0, 0]
            own.neg_()
            loss += softplus(tile, threshold=_LINEAR).sum()
            if not (need_x or need_y):
                continue
            tile.sigmoid_()
            own.neg_()
            total += tile.sum()
            if need_x:
                of_x[i].addmm_(tile, y[j])
            if need_y:
                of_y[j].addmm_(tile.T, x[i])
    return loss, total, of_x, of_y
