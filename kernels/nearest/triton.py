"""The Triton kernel. ``launch.py`` launches it.

One program per block of rows and span of columns keeps the largest score of each row and its column. Each span has its
own slot, and torch takes the largest of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..similarity.triton import load_tile, long_dots


@triton.jit
def nearest_kernel(
    p_x, p_y,
    p_top, p_place,  # [spans, N]
    N, M, stride_x, stride_y, excluded,
    span,  # tiles of columns per program
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXCLUDE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Find the largest score of each row of a block over a span of columns. NaN counts as the largest."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.arange(0, BLOCK_D)
    if D <= BLOCK_D:
        x = load_tile(p_x, rows, features, N, stride_x, D, D != BLOCK_D, WIDEN)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    place = tl.zeros([BLOCK_M], tl.int32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(M, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        if D <= BLOCK_D:
            y = load_tile(p_y, cols, features, M, stride_y, D, D != BLOCK_D, WIDEN)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            s = long_dots(
                p_x, p_y, rows, cols, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
            )
        s = tl.where(s == s, s, float("inf"))
        keep = (cols < M)[None, :]
        if EXCLUDE:
            keep = keep & (cols[None, :] != (rows + excluded)[:, None])
        s = tl.where(keep, s, -float("inf"))
        value, column = tl.max(s, 1, return_indices=True)
        place = tl.where(value > top, step * BLOCK_N + column, place)
        top = tl.maximum(top, value)
    tl.store(p_top + part.to(tl.int64) * N + rows, top, mask=rows < N)
    tl.store(p_place + part.to(tl.int64) * N + rows, place, mask=rows < N)
