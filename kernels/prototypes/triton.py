"""Attention of the teacher's rows to prototypes. ``launch.py`` launches it.

The symbols are defined in cpu.py. Everything is in base 2, with fp32 accumulators. A program has a block of rows and a
span of prototypes: there are few rows and many prototypes. torch joins the results of the spans. The log-sum-exps and
all gradients are the kernels of the similarities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..similarity.triton import LOG2E, load_tile, long_dots


@triton.jit
def attend_kernel(
    p_q, p_keys, p_values,
    p_bias,  # [parts, K], one row per ``part_rows`` queries
    p_top, p_total,  # [spans, T]
    p_out,  # [spans, T, D]
    T, K, stride_q, stride_keys, stride_values, scale, part_rows, span,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sum the values of a block of queries with softmax weights, relative to the largest score of the span."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    features = tl.arange(0, BLOCK_D)
    factor = scale * LOG2E
    if D <= BLOCK_D:
        q = load_tile(p_q, rows, features, T, stride_q, D, D != BLOCK_D, WIDEN)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(K, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        if D <= BLOCK_D:
            keys = load_tile(p_keys, cols, features, K, stride_keys, D, D != BLOCK_D, WIDEN)
            s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        else:
            s = long_dots(
                p_q, p_keys, rows, cols, T, K, stride_q, stride_keys, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
            )
        s = s * factor
        if HAS_BIAS:
            places = (rows // part_rows).to(tl.int64)[:, None] * K + cols[None, :]
            s += tl.load(p_bias + places, mask=(rows < T)[:, None] & (cols < K)[None, :], other=0.0) * LOG2E
        s = tl.where((cols < K)[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        values = load_tile(p_values, cols, outs, K, stride_values, D, D % BLOCK_OUT != 0, WIDEN)
        out = tl.dot(p.to(values.dtype), values, out * fade[:, None], input_precision=PRECISION)
        top = new
    rows64 = part.to(tl.int64) * T + rows
    tl.store(p_out + rows64[:, None] * D + outs[None, :], out, mask=(rows < T)[:, None] & (outs < D)[None, :])
    first = (rows < T) & (tl.program_id(2) == 0)
    tl.store(p_top + rows64, top, mask=first)
    tl.store(p_total + rows64, total, mask=first)
