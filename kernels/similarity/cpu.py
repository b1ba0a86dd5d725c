"""The CPU path: square tiles that stay in the cache and are changed in place. A symmetric matrix needs half of them.

    e_ij = 2^(c <x_i, y_j> + b_j log2 e),   c = scale log2 e        one product and one exponential per tile, in each
                                                                    direction, and never an N x M matrix
    lse_i = log sum_j e_ij
    G_ij = g_i exp(s_ij - lse_i) + h_j exp(s_ij - lse'_j)           g, h: gradients of row and column log-sum-exps
    dx = scale G y,  dy = scale G^T x,  dbias_j = sum_i G_ij

Everything is in base 2. torch's exp2 is torch's own vector code on every processor (1.2 units in the last place), but
its exp is the maths library's. On the AMD machine of NOTES.md exp2 is four times faster. Scores within +-40 nats need
no shift: neither 2^s nor a sum of them leaves the range of fp32, so the sums of tiles are added in any order. Other
scores need a running maximum.

The same code serves fp64, which gradcheck needs, and CUDA tensors of types that the Triton kernels do not support. On
CUDA, reading the sums waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..precision import accumulable

LOG2E = math.log2(math.e)
BOUND = 40.0
"""Scores within +-BOUND nats need no shift: e^-80 is the smallest probability, and normal times a gradient of 1/N."""
_TILE = 768
_ROWS = 256
CLAMP = -80.0
"""2^-80 is negligible next to 1. Times a small gradient it is not yet denormal, which is 100 times slower."""

Weights = tuple[Tensor, Tensor]
"""A log-sum-exp and the gradient with respect to it, both [N] or both [M]."""

Positive = tuple[int, Tensor]
"""A distance d and a number: G is smaller by the number where the column is row + d or row - d."""


def pair_lse(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    *,
    scale: float,
    excluded: int | None,
    unit_norm: bool,
    columns: bool,
    attend: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-sum-exps of rows [N], and with ``columns`` of columns [M], else an empty tensor.

    The third result with ``attend`` is the mean of y with the weights of each row's softmax, [N, D], else empty.
    """
    x, y, bias = accumulable(x), accumulable(y), None if bias is None else accumulable(bias)
    scale = _scale(scale, gain)
    if _bounded(x, y, bias, scale, unit_norm):
        rows, cols = x.new_zeros(len(x)), x.new_zeros(len(y) if columns else 0)
        means = x.new_zeros(x.shape if attend else (0, 0))
        for i, j, e in _exponentials(x, y, bias, scale, excluded):
            rows[i].add_(e.sum(1))
            if columns:
                cols[j].add_(e.sum(0))
            if attend:
                means[i].addmm_(e, y[j])
        if attend:
            means /= _positive(rows)[:, None]
        if _within_bound(rows.log_()) and (not columns or _within_bound(cols.log_())):
            return rows, cols, means
    rows, means = _running_maximum(x, y, bias, scale, excluded, attend=attend)
    return rows, _running_maximum(y, x, None, scale, None)[0] if columns else x.new_empty(0), means


def self_lse(
    x: Tensor, gain: Tensor | None, *, scale: float, exclude_self: bool, unit_norm: bool
) -> tuple[Tensor, Tensor]:
    """Return the row log-sum-exps [N] of x with itself, and if :func:`is_kept` the probabilities [N, N]."""
    x, scale = accumulable(x), _scale(scale, gain)
    excluded = 0 if exclude_self else None
    if is_kept(len(x)):
        return _one_tile(x, scale, excluded)
    nothing = x.new_empty(0, 0)
    if _bounded(x, x, None, scale, unit_norm):
        rows = x.new_zeros(len(x))
        for i, j, e in _exponentials(x, x, None, scale, excluded, symmetric=True):
            rows[i].add_(e.sum(1))
            if i != j:
                rows[j].add_(e.sum(0))
        if _within_bound(rows.log_()):
            return rows, nothing
    return _running_maximum(x, x, None, scale, excluded)[0], nothing


def pair_backward(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    rows: Weights | None,
    cols: Weights | None,
    *,
    scale: float,
    excluded: int | None,
    unit_norm: bool,
    need_x: bool,
    need_y: bool,
    positive: Positive | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x and y divided by the gain, and of bias, in the type of accumulation.

    Those not needed are empty.
    """
    x, y, bias = accumulable(x), accumulable(y), None if bias is None else accumulable(bias)
    dx = x.new_zeros(x.shape if need_x else (0,))
    dy = y.new_zeros(y.shape if need_y else (0,))
    dbias = x.new_zeros(0 if bias is None else len(y))
    for i, j, grad in _gradients(x, y, bias, rows, cols, _scale(scale, gain), excluded, positive):
        if need_x:
            dx[i].addmm_(grad, y[j], alpha=scale)
        if need_y:
            dy[j].addmm_(grad.T, x[i], alpha=scale)
        if bias is not None:
            dbias[j].add_(grad.sum(0))
    return dx, dy, dbias


def self_backward(
    x: Tensor,
    gain: Tensor | None,
    weights: Weights,
    kept: Tensor,
    *,
    scale: float,
    exclude_self: bool,
    unit_norm: bool,
    positive: Positive | None = None,
) -> Tensor:
    """Return the gradient of x divided by the gain.

    G is symmetric, so each tile above the diagonal also serves its mirror tile.
    """
    x = accumulable(x)
    if len(kept):
        half = kept * (weights[1] * scale)[:, None]
        return torch.mm(half + half.T, x, out=x.new_empty(x.shape))  # autocast does not change calls with out=
    dx = x.new_zeros(x.shape)
    excluded = 0 if exclude_self else None
    for i, j, grad in _gradients(x, x, None, weights, weights, _scale(scale, gain), excluded, positive, symmetric=True):
        dx[i].addmm_(grad, x[j], alpha=scale)
        if i != j:
            dx[j].addmm_(grad.T, x[i], alpha=scale)
    return dx


def is_kept(count: int) -> bool:
    """Return whether the probabilities of ``count`` rows are one tile, which is saved for the backward pass."""
    return count <= _TILE


def contrast(
    q: Tensor,
    k: Tensor,
    gain: Tensor | None,
    *,
    scale: float,
    joint: bool,
    need_q: bool,
    need_k: bool,
    bounded: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return a loss of contrast.py, and the gradients of q and k divided by the gain. Those not needed are empty.

    The sums of a chunk of rows are complete before the next chunk, so its scores become G at once: 3 products instead
    of 4. ``joint`` has one chunk, whose G serves both sides: 2 products, and one gradient of all rows.
    """
    q, k = accumulable(q), accumulable(k)
    x = torch.cat([q, k]) if joint else q
    y, factor = x if joint else k, _scale(scale, gain)
    bounded = bounded and abs(factor) <= BOUND
    scaled, share = x * (factor * LOG2E), scale / len(x)
    parts = [slice(0, len(x))] if joint else spans(len(x), max(_ROWS, _TILE * _TILE // len(y)))
    buffer = x.new_empty(parts[0].stop * len(y))
    loss = dq = dk = x.new_zeros(())
    for i in parts:
        tile = buffer[: (i.stop - i.start) * len(y)].view(-1, len(y))
        torch.mm(scaled[i], y.T, out=tile)
        positives = tile.diagonal(len(q) if joint else i.start)
        crossed = positives.sum()
        if joint:
            tile.fill_diagonal_(-torch.inf)
        top = None if bounded else tile.amax(1, keepdim=True)
        total = (tile if top is None else tile.sub_(top)).exp2_().sum(1, keepdim=True)
        if bounded and not _is_safe(total):
            return contrast(q, k, gain, scale=scale, joint=joint, need_q=need_q, need_k=need_k, bounded=False)
        lse = total.log2() if top is None else total.log2().add_(top)
        loss = loss + torch.sub(lse.sum(), crossed, alpha=1 + joint)
        tile *= share / total
        positives -= share
        if joint:
            tile.diagonal(-len(q)).sub_(share)
            dq = torch.mm(tile + tile.T, x, out=torch.empty_like(x))
            continue
        if i.start == 0:
            dq, dk = (x.new_empty(z.shape if need else (0, 0)) for z, need in ((q, need_q), (k, need_k)))
        if need_q:
            torch.mm(tile, y, out=dq[i])
        if need_k:
            dk.addmm_(tile.T, q[i], beta=min(i.start, 1))
    return loss / (LOG2E * len(x)), (dq, x.new_empty(0, 0) if joint else dk)


def _is_safe(sums: Tensor) -> bool:
    """Return whether sums stayed in fp32's safe range. They do not if the promise of unit norm was broken."""
    least, most = sums.aminmax()
    return least.item() >= math.exp(-BOUND) and most.item() <= math.exp(2 * BOUND)


def _one_tile(x: Tensor, scale: float, excluded: int | None) -> tuple[Tensor, Tensor]:
    """Return log-sum-exps [N] and probabilities [N, N]. For few rows, torch's calls cost as much as their work."""
    tile = torch.mm(x * (scale * LOG2E), x.T, out=x.new_empty(len(x), len(x)))
    if excluded is not None:
        tile.fill_diagonal_(-torch.inf)
    top = tile.amax(1, keepdim=True).clamp_min_(torch.finfo(x.dtype).min)  # a row of -inf only has a sum of 0
    total = tile.sub_(top).exp2_().sum(1, keepdim=True)
    tile.div_(total.clamp_min(torch.finfo(x.dtype).tiny))
    return total.log2_().add_(top).mul_(1 / LOG2E).squeeze(1), tile


def finite_weights(lse: Tensor, grad: Tensor) -> Weights:
    """Replace the weights of rows with an empty sum (-inf) by 0. They have no gradient, and would give inf times 0."""
    empty = lse == -torch.inf
    return lse.masked_fill(empty, 0), grad.masked_fill(empty, 0)


def _scale(scale: float, gain: Tensor | None) -> float:
    return scale if gain is None else scale * gain.item()


def _bounded(x: Tensor, y: Tensor, bias: Tensor | None, scale: float, unit_norm: bool) -> bool:
    """Return whether every score should be within +-BOUND, by promise or by :func:`is_bounded`."""
    return abs(scale) <= BOUND if unit_norm and bias is None else is_bounded(x, y, bias, scale)


def is_bounded(x: Tensor, y: Tensor, bias: Tensor | None, scale: float) -> bool:
    """Return whether every score is within +-BOUND by |<x, y>| <= |x| |y|. NaN gives False."""
    longest = _longest(x)
    bound = abs(scale) * longest * (longest if y is x else _longest(y))
    return bound + (0 if bias is None else float(bias.abs().max())) <= BOUND


def _within_bound(lse: Tensor) -> bool:
    """Return whether the sums stayed in fp32's safe range. They do not if the promise of unit norm was broken."""
    least, most = lse.aminmax()
    return least.item() >= -BOUND and most.item() <= 2 * BOUND


def _longest(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dim=1).max())


def spans(length: int, most: int) -> list[slice]:
    """Return equal parts of at most ``most`` rows. A last part of a few rows would cost the calls of a whole tile."""
    parts = -(-length // most)
    step = -(-length // parts)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _tiles(
    x: Tensor, y: Tensor, bias: Tensor | None, scale: float, *, symmetric: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield scores in base 2, tile by tile, in one buffer. If ``symmetric``, yield the upper triangle only."""
    scaled = x * (scale * LOG2E)
    across = y.T
    row_spans = spans(len(x), _TILE if symmetric else max(_TILE, _TILE * _TILE // len(y)))
    col_spans = row_spans if symmetric else spans(len(y), _TILE * _TILE // row_spans[0].stop)
    buffer = x.new_empty(row_spans[0].stop * col_spans[0].stop)
    for position, i in enumerate(row_spans):
        for j in col_spans[position if symmetric else 0 :]:
            height, width = i.stop - i.start, j.stop - j.start
            tile = buffer[: height * width].view(height, width)
            torch.mm(scaled[i], across[:, j], out=tile)
            if bias is not None:
                tile += bias[j] * LOG2E
            yield i, j, tile


def _fill_excluded(tile: Tensor, i: slice, j: slice, excluded: int | None, value: float) -> None:
    """Set the entries of a tile with column = row + excluded."""
    if excluded is None:
        return
    offset = i.start + excluded - j.start
    if -tile.shape[0] < offset < tile.shape[1]:
        tile.diagonal(offset).fill_(value)


def _exponentials(
    x: Tensor, y: Tensor, bias: Tensor | None, scale: float, excluded: int | None, *, symmetric: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    for i, j, tile in _tiles(x, y, bias, scale, symmetric=symmetric):
        tile.exp2_()
        _fill_excluded(tile, i, j, excluded, 0.0)
        yield i, j, tile


def _running_maximum(
    x: Tensor, y: Tensor, bias: Tensor | None, scale: float, excluded: int | None, *, attend: bool = False
) -> tuple[Tensor, Tensor]:
    """Return row log-sum-exps of scores of any size, and the means of ``attend`` of :func:`pair_lse`.

    Each row has a running maximum, and a sum and a mean relative to it.
    """
    top = x.new_full((len(x),), -torch.inf)
    total = x.new_zeros(len(x))
    means = x.new_zeros(x.shape if attend else (0, 0))
    for i, j, tile in _tiles(x, y, bias, scale):
        _fill_excluded(tile, i, j, excluded, -torch.inf)
        new = torch.maximum(top[i], tile.amax(1))
        shift = new.masked_fill(new == -torch.inf, 0)  # rows without a term so far
        tile -= shift[:, None]
        fade = (top[i] - shift).exp2_()
        total[i] = total[i] * fade + tile.exp2_().sum(1)
        if attend:
            means[i].mul_(fade[:, None]).addmm_(tile, y[j])
        top[i] = new
    if attend:
        means /= _positive(total)[:, None]
    return (total.log2_() + top).mul_(1 / LOG2E), means


def _positive(sums: Tensor) -> Tensor:
    """Return sums to divide by: an empty one has a mean of 0."""
    return sums.clamp_min(torch.finfo(sums.dtype).tiny)


def _gradients(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    rows: Weights | None,
    cols: Weights | None,
    scale: float,
    excluded: int | None,
    positive: Positive | None = None,
    *,
    symmetric: bool = False,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the tiles of G.

    The sums of the forward pass show whether 2^s needs a shift: no score exceeds the sum of its row or column.
    """
    rows_bounded = rows is None or _within_bound(rows[0])
    if rows_bounded and (cols is None or cols is rows or _within_bound(cols[0])):
        a = None if rows is None else rows[1] * torch.exp(-rows[0])
        b = None if cols is None else a if cols is rows else cols[1] * torch.exp(-cols[0])
        sums = None
        for i, j, e in _exponentials(x, y, bias, scale, excluded, symmetric=symmetric):
            if a is not None and b is not None:
                if sums is None:
                    sums = x.new_empty(e.numel())  # the first tile is the largest
                e *= torch.add(a[i, None], b[j], out=sums[: e.numel()].view_as(e))
            elif a is not None:
                e *= a[i, None]
            elif b is not None:
                e *= b[j]
            _subtract_positive(e, i, j, positive)
            yield i, j, e
        return
    rows, cols = (None if weights is None else _finite_base2(*weights) for weights in (rows, cols))
    for i, j, tile in _tiles(x, y, bias, scale, symmetric=symmetric):
        grad = None
        if rows is not None:
            grad = _softmax(tile - rows[0][i, None], rows[1][i, None])
        if cols is not None:
            of_cols = _softmax(tile - cols[0][j], cols[1][j])
            grad = of_cols if grad is None else grad.add_(of_cols)
        assert grad is not None
        _fill_excluded(grad, i, j, excluded, 0.0)
        _subtract_positive(grad, i, j, positive)
        yield i, j, grad


def _subtract_positive(tile: Tensor, i: slice, j: slice, positive: Positive | None) -> None:
    if positive is None:
        return
    distance, share = positive
    for offset in {i.start + distance - j.start, i.start - distance - j.start}:
        if -tile.shape[0] < offset < tile.shape[1]:
            tile.diagonal(offset).sub_(share)


def _finite_base2(lse: Tensor, grad: Tensor) -> Weights:
    lse, grad = finite_weights(lse, grad)
    return lse * LOG2E, grad


def _softmax(exponent: Tensor, weight: Tensor) -> Tensor:
    return exponent.clamp_min_(CLAMP).exp2_().mul_(weight)
