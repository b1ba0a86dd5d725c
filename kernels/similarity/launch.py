"""Launch the Triton kernels: tiles, grids, slots for partial sums. The functions have the signatures of cpu.py.

Triton launches on the current device, so every launch makes the tensors' device the current one.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from ..backend import interpreting
from .cpu import BOUND, Positive, Weights, finite_weights
from .tiles import Tile, backward_tile, forward_tile
from .triton import both_lse_kernel, row_lse_kernel, weighted_sum_kernel

_PROGRAMS = 2  # per multiprocessor
_MOST_SLOTS = 64  # of partial column sums; above, a block of rows has several tiles, with one launch each


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
    attend: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`cpu.pair_lse` without ``attend``. Bounded scores need one pass for both directions, others two."""
    x, y, bias = adjacent(x), adjacent(y), packed(bias)
    bounded = _bounded(bias, gain, scale, unit_norm)
    means = x.new_empty(0, 0, dtype=torch.float32)
    if columns and bounded:
        return *_both_pass(x, y, gain, scale, excluded, symmetric=False), means
    rows = _rows_pass(x, y, bias, gain, scale, excluded, bounded)
    if not columns:
        return rows, rows.new_empty(0), means
    return rows, _rows_pass(y, x, None, gain, scale, None if excluded is None else -excluded, bounded), means


def self_lse(
    x: Tensor, gain: Tensor | None, *, scale: float, exclude_self: bool, unit_norm: bool
) -> tuple[Tensor, Tensor]:
    """Like :func:`cpu.self_lse`, but nothing is saved. Bounded scores need half the tiles, other scores all."""
    x = adjacent(x)
    excluded = 0 if exclude_self else None
    if _bounded(None, gain, scale, unit_norm):
        rows, _ = _both_pass(x, x, gain, scale, excluded, symmetric=True)
    else:
        rows = _rows_pass(x, x, None, gain, scale, excluded, bounded=False)
    return rows, rows.new_empty(0, 0)


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
    """Like :func:`cpu.pair_backward`. One pass goes over the rows for dx, and one over the columns for dy and dbias."""
    x, y, bias = adjacent(x), adjacent(y), packed(bias)
    bounded = _bounded(bias, gain, scale, unit_norm)
    # One tensor for all absent gradients would alias the operator's outputs.
    dx, dy, dbias = (x.new_empty(0, dtype=torch.float32) for _ in range(3))
    if need_x:
        dx, _ = _backward(x, y, gain, rows, cols, scale, excluded, bounded, col_bias=bias, positive=positive)
    if need_y or bias is not None:
        excluded = None if excluded is None else -excluded
        sums = bias is not None
        of_y, dbias = _backward(
            y, x, gain, cols, rows, scale, excluded, bounded, row_bias=bias, sums=sums, positive=positive
        )
        dy = of_y if need_y else dy
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
    """Like :func:`cpu.self_backward`. It is one pass, because G is symmetric."""
    x = adjacent(x)
    bounded = _bounded(None, gain, scale, unit_norm)
    excluded = 0 if exclude_self else None
    dx, _ = _backward(x, x, gain, weights, weights, scale, excluded, bounded, positive=positive)
    return dx


def adjacent(x: Tensor) -> Tensor:
    """Return x with adjacent features. The rows may be strided."""
    return x if x.stride(1) == 1 else x.contiguous()


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which the device of x is the current one. It does nothing for the CPU."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


def packed(numbers: Tensor | None) -> Tensor | None:
    """Return numbers without gaps, as the kernels read them. Of a column they would read its neighbours."""
    return None if numbers is None else numbers.contiguous()


def _bounded(bias: Tensor | None, gain: Tensor | None, scale: float, unit_norm: bool) -> bool:
    """Return whether the caller's promise bounds the scores. It does not wait for a value on the device."""
    return unit_norm and bias is None and gain is None and abs(scale) <= BOUND


def _rows_pass(
    x: Tensor, y: Tensor, bias: Tensor | None, gain: Tensor | None, scale: float, excluded: int | None, bounded: bool
) -> Tensor:
    """Return the log-sum-exps of the rows of x."""
    n, m = len(x), len(y)
    tile = forward_tile(x.shape[1], x.dtype, capability(x))
    blocks, span, slots = spans_of(x, m, tile)
    sums = x.new_empty(slots, n, dtype=torch.float32)
    with on_device(x):
        row_lse_kernel[(blocks, slots)](
            x, y, bias, gain, sums, n, m, x.stride(0), y.stride(0), scale, excluded or 0, span,
            **sizes(x, tile), BOUNDED=bounded, EXCLUDE=excluded is not None, **kernel_options(tile),
        )  # fmt: skip
    return sums.sum(0).log_() if bounded else sums.mul_(math.log(2)).logsumexp(0)


def _both_pass(
    x: Tensor, y: Tensor, gain: Tensor | None, scale: float, excluded: int | None, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exps of rows and columns of bounded scores. If x is y they are the same."""
    n, m = len(x), len(y)
    tile = forward_tile(x.shape[1], x.dtype, capability(x), columns=True)
    row_tiles, col_tiles = triton.cdiv(n, tile.block_m), triton.cdiv(m, tile.block_n)
    tiles = triton.cdiv(row_tiles, _MOST_SLOTS)
    span = tiles * tile.block_m // tile.block_n if symmetric else triton.cdiv(col_tiles, _MOST_SLOTS)
    grid = (triton.cdiv(row_tiles, tiles), triton.cdiv(col_tiles, span))
    row_sums = x.new_empty(grid[1], n, dtype=torch.float32)
    col_sums = row_sums if symmetric else x.new_empty(grid[0], m, dtype=torch.float32)
    with on_device(x):
        for number in range(tiles):
            both_lse_kernel[grid](
                x, y, gain, row_sums, col_sums, n, m, x.stride(0), y.stride(0), scale, excluded or 0, span, number,
                tiles, **sizes(x, tile), SYMMETRIC=symmetric, EXCLUDE=excluded is not None, **kernel_options(tile),
            )  # fmt: skip
    rows = row_sums.sum(0).log_()
    return rows, rows if symmetric else col_sums.sum(0).log_()


def weighted_sum(
    x: Tensor,
    y: Tensor,
    tile: Tile,
    scale: float,
    *,
    values: Tensor | None = None,
    gain: Tensor | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    part_bias: Tensor | None = None,
    rows: Weights | None = None,
    cols: Weights | None = None,
    other: Tensor | None = None,
    energy: Tensor | None = None,
    positive: Positive | None = None,
    excluded: int | None = None,
    bounded: bool = False,
    result: bool = True,
    sums: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``scale sum_j G_ij y_j`` [N, D], or without a scale for ``values``, and the sums of G [N].

    For G see triton.py. ``out`` [N, D] is added to the result in place. A result that is not requested is empty.
    """
    n, m, dim = len(x), len(y), x.shape[1]
    parts = triton.cdiv(dim, tile.block_out) if result else 1
    blocks, span, slots = spans_of(x, m, tile, parts)
    add = out is not None and slots == 1
    into = out if add else x.new_empty(slots, n, dim, dtype=torch.float32) if result else None
    totals = x.new_empty(slots, n, dtype=torch.float32) if sums else None
    row_lse, row_grad = rows or (None, None)
    col_lse, col_grad = cols or (None, None)
    distance, share = positive or (0, None)
    strides = x.stride(0), y.stride(0), 0 if values is None else values.stride(0)
    out_scale, part_rows = scale if values is None else 1.0, m if part_bias is None else m // len(part_bias)
    with on_device(x):
        weighted_sum_kernel[(blocks, slots, parts)](
            x, y, values, gain, packed(row_bias), packed(col_bias), packed(part_bias), row_lse, packed(row_grad),
            col_lse, packed(col_grad), packed(other), packed(energy), share, into, totals,
            n, m, *strides, scale, out_scale, excluded or 0, distance, part_rows, span,
            **sizes(x, tile), BLOCK_OUT=tile.block_out, BOUNDED=bounded, EXCLUDE=excluded is not None, ADD=add,
            **kernel_options(tile),
        )  # fmt: skip
    nothing = x.new_empty(0, dtype=torch.float32)
    total = nothing if totals is None else totals.sum(0)
    if into is None or add:
        return nothing if out is None else out, total
    gradient = into[0] if slots == 1 else into.sum(0)
    return gradient if out is None else out.add_(gradient), total


def _backward(
    x: Tensor,
    y: Tensor,
    gain: Tensor | None,
    rows: Weights | None,
    cols: Weights | None,
    scale: float,
    excluded: int | None,
    bounded: bool,
    *,
    col_bias: Tensor | None = None,
    row_bias: Tensor | None = None,
    sums: bool = False,
    positive: Positive | None = None,
) -> tuple[Tensor, Tensor]:
    infinite = excluded is not None or col_bias is not None or row_bias is not None
    rows, cols, unscale = _weights(rows, cols, x.dtype, bounded=bounded, infinite=infinite)
    if unscale is not None and positive is not None:
        positive = positive[0], positive[1] / unscale
    dx, total = weighted_sum(
        x,
        y,
        backward_tile(x.shape[1], x.dtype, capability(x)),
        scale,
        gain=gain,
        row_bias=row_bias,
        col_bias=col_bias,
        rows=rows,
        cols=cols,
        positive=positive,
        excluded=excluded,
        bounded=bounded,
        sums=sums,
    )
    return (dx, total) if unscale is None else (dx.mul_(unscale), total.mul_(unscale))


def _weights(
    rows: Weights | None, cols: Weights | None, dtype: torch.dtype, *, bounded: bool, infinite: bool
) -> tuple[Weights | None, Weights | None, Tensor | None]:
    """Return log-sum-exps and gradients in the form of the kernel, and a factor for its results, or None.

    For bounded scores, a gradient is multiplied by e^-lse. The gradient of an empty sum is then infinite, but the
    kernel uses it for no score. For other scores it must be finite. fp16 cannot represent G of 1e-8, so its gradients
    are scaled to at most 2^14.
    """
    unscale = None
    if dtype == torch.float16:
        peaks = [weights[1].abs().amax() for weights in (rows, cols) if weights is not None]
        unscale = torch.stack(peaks).amax().clamp_min(torch.finfo(torch.float32).tiny) * 2.0**-14

    def prepared(weights: Weights | None) -> Weights | None:
        if weights is None:
            return None
        lse, grad = finite_weights(*weights) if infinite and not bounded else weights
        grad = lse.neg().exp_().mul_(grad) if bounded else grad
        return lse.contiguous(), (grad if unscale is None else grad / unscale).contiguous()

    of_rows = prepared(rows)
    return of_rows, of_rows if cols is rows else prepared(cols), unscale


def spans_of(x: Tensor, columns: int, tile: Tile, parts: int = 1) -> tuple[int, int, int]:
    """Return the blocks of rows of x, the tiles of columns per program, and the spans of so many tiles.

    Each block has a program for every span and each of ``parts`` parts of the features.
    """
    blocks, tiles = triton.cdiv(len(x), tile.block_m), triton.cdiv(columns, tile.block_n)
    span = triton.cdiv(tiles, splits(x, blocks * parts, tiles))
    return blocks, span, triton.cdiv(tiles, span)


def splits(x: Tensor, programs: int, tiles: int) -> int:
    """Return the number of spans of columns, so that few rows still fill the chip."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return max(1, min(tiles, _PROGRAMS * processors // programs))


def capability(x: Tensor) -> int:
    """Return the GPU's compute capability, 90 for 9.0, or 0 if kernels are interpreted."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    return 10 * major + minor


def sizes(x: Tensor, tile: Tile) -> dict[str, int]:
    """Return the sizes of a tile of rows as compile-time constants."""
    return {"D": x.shape[-1], "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d}


def kernel_options(tile: Tile) -> dict[str, object]:
    """Return the options of a tile. fp32 products take three tf32 passes, which have fp32's accuracy."""
    return {"PRECISION": "tf32x3", "WIDEN": interpreting(), "num_warps": tile.warps, "num_stages": tile.stages}
