"""The Triton kernel. ``launch.py`` launches it. The symbols are defined in cpu.py.

One program per block of rows, span of columns and part of the features. G y accumulates in registers, and the losses
and G of a row are summed next to it. The same kernel gives G^T x, with x and y exchanged. Each span has its own slot,
and torch adds the slots. So there are no atomics, and the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..similarity.triton import load_tile, long_dots


@triton.jit
def sigmoid_kernel(
    p_x, p_y, p_scale, p_bias,
    p_loss, p_total,  # [spans, N], if SUMS
    p_out,  # [spans, N, D], if GRADIENT
    N, M, stride_x, stride_y,
    first,  # the own pair of row i is the column i + first
    span,  # tiles of columns per program
    boost,  # factor of G in p_out
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    SUMS: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sum the losses of a block of rows over a span of columns, and G times the columns."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    scale, bias = tl.load(p_scale).to(tl.float32), tl.load(p_bias).to(tl.float32)
    loss, total = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(M, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        s = bias + scale * long_dots(
            p_x, p_y, rows, cols, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
        )
        own = cols[None, :] == (rows + first)[:, None]
        keep = (rows < N)[:, None] & (cols < M)[None, :]
        s = tl.where(own, -s, s)
        e = tl.exp(-tl.abs(s))
        if SUMS:
            # log(1 + e) of a small e: the rounding of 1 + e cancels in the quotient.
            u = 1 + e
            log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
            loss += tl.sum(tl.where(keep, tl.maximum(s, 0.0) + log1p, 0.0), 1)
        g = tl.where(s > 0, 1.0, e) / (1 + e)
        g = tl.where(keep, tl.where(own, -g, g), 0.0)
        if SUMS:
            total += tl.sum(g, 1)
        if GRADIENT:
            y = load_tile(p_y, cols, outs, M, stride_y, D, D % BLOCK_OUT != 0, WIDEN)
            out = tl.dot((g * boost).to(y.dtype), y, out, input_precision=PRECISION)
    if SUMS:
        tl.store(p_loss + part.to(tl.int64) * N + rows, loss, mask=rows < N)
        tl.store(p_total + part.to(tl.int64) * N + rows, total, mask=rows < N)
    if GRADIENT:
        places = (part.to(tl.int64) * N + rows)[:, None] * D + outs[None, :]
        tl.store(p_out + places, out, mask=(rows < N)[:, None] & (outs < D)[None, :])
