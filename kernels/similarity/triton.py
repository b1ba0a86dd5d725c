"""The Triton kernels. ``launch.py`` launches them.

The symbols are defined in cpu.py. Everything is in base 2, with fp32 accumulators:

    s_ij = scale <x_i, y_j> + b_j                          [BLOCK_M, BLOCK_N] tile, in registers only
    forward    rows_i = sum_j e^s_ij        cols_j = sum_i e^s_ij
    backward   G_ij = g_i e^(s_ij - lse_i) + h_j e^(s_ij - lse'_j),    dx_i = scale sum_j G_ij y_j

Forward: one program per block of rows and span of columns. The tile of x stays on the chip, and tiles of y are read
one after another. Each sum has its own slot, ``p_rows[span of columns, row]`` and ``p_cols[block of rows, column]``,
and torch adds the slots. So there are no atomics, and the same bits every time. If x is y, only spans on and above the
diagonal run: their column sums are the row sums of the spans below. A block with column sums has one tile of rows per
launch. Each launch adds to the slots of the previous one. With column sums the tile is transposed, [BLOCK_N, BLOCK_M].
Each step sums along the second axis, which stays within a quarter of a warp. The sum along the first axis is taken
once, at the end.

Backward: one program per block of rows, span of columns and part of the features. dx accumulates in registers. The
same kernel gives dy, with x and y, and rows and columns, exchanged. If x is y, G is symmetric and one pass is enough.

BOUNDED: scores within +-40 nats need no running maximum, see cpu.py. The gradients of the log-sum-exps are then
multiplied by e^-lse once, before the launch, instead of by every program.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(p, rows, features, count, stride, D: tl.constexpr, PADDED: tl.constexpr, WIDEN: tl.constexpr):
    """Load rows of a matrix, or a part of their features. Values outside of the matrix are 0."""
    mask = (rows < count)[:, None]
    if PADDED:
        mask = mask & (features < D)[None, :]
    tile = tl.load(p + rows.to(tl.int64)[:, None] * stride + features[None, :], mask=mask, other=0.0)
    if WIDEN:  # the interpreter's bf16 arithmetic is wrong, but widened operands are exact
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def long_dots(
    p_x, p_y, rows, cols, N, M, stride_x, stride_y, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return dot products of rows that are too long for the chip, part by part."""
    dots = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        x = load_tile(p_x, rows, features, N, stride_x, D, D % BLOCK_D != 0, WIDEN)
        y = load_tile(p_y, cols, features, M, stride_y, D, D % BLOCK_D != 0, WIDEN)
        dots = tl.dot(x, tl.trans(y), dots, input_precision=PRECISION)
    return dots


@triton.jit
def base2_scale(scale, p_gain, HAS_GAIN: tl.constexpr):
    """Return the factor from a dot product to a score in base 2."""
    factor = scale * LOG2E
    if HAS_GAIN:
        factor = factor * tl.load(p_gain).to(tl.float32)
    return factor


@triton.jit
def at_edge(
    column, row, excluded, N, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, EXCLUDE: tl.constexpr
):
    """Return whether a tile has invalid scores: beyond the last column (``ROWS``: or row), or excluded.

    Few tiles have. The others are spared a comparison per score.
    """
    edge = column + BLOCK_N > M
    if ROWS:
        edge = edge | (row + BLOCK_M > N)
    if EXCLUDE:
        own = row + excluded  # the column that the first row excludes
        edge = edge | ((own < column + BLOCK_N) & (column < own + BLOCK_M))
    return edge


@triton.jit(do_not_specialize=["tile", "tiles"])
def lse_fwd_kernel(
    p_x, p_y, p_bias, p_gain,
    p_rows,  # [spans, N] sums if BOUNDED, else log2 of the sums
    p_cols,  # [blocks of rows, M] sums, if COLUMNS; p_rows itself if SYMMETRIC
    N, M, stride_x, stride_y, scale, excluded,
    span,  # tiles of columns per program
    tile, tiles,  # of rows: the number of this one in its block, and their count
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr, EXCLUDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sum the exponentials of a tile of rows over a span of columns, and of the columns over the tile."""
    block, part = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC:
        if part < block:
            return
    factor = base2_scale(scale, p_gain, HAS_GAIN)
    features = tl.arange(0, BLOCK_D)
    first = (block * tiles + tile) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    if D <= BLOCK_D:
        x = load_tile(p_x, rows, features, N, stride_x, D, D != BLOCK_D, WIDEN)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if COLUMNS:
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(M, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        edge = at_edge(step * BLOCK_N, first, excluded, N, M, BLOCK_M, BLOCK_N, COLUMNS, EXCLUDE)
        if D <= BLOCK_D:
            y = load_tile(p_y, cols, features, M, stride_y, D, D != BLOCK_D, WIDEN)
        if COLUMNS:
            if D <= BLOCK_D:
                s = tl.dot(y, tl.trans(x), input_precision=PRECISION)
            else:
                s = long_dots(
                    p_y, p_x, cols, rows, M, N, stride_y, stride_x, D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION, WIDEN
                )
            e = tl.exp2(s * factor)
            if edge:
                keep = (cols < M)[:, None] & (rows < N)[None, :]
                if EXCLUDE:
                    keep = keep & (cols[:, None] != (rows + excluded)[None, :])
                e = tl.where(keep, e, 0.0)
            sums += e
            slot = p_cols + block.to(tl.int64) * M + cols
            owned = (cols < M) & (part > block) if SYMMETRIC else cols < M
            before = tl.load(slot, mask=owned & (tile > 0), other=0.0)
            tl.store(slot, before + tl.sum(e, 1), mask=owned)
        else:
            if D <= BLOCK_D:
                s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            else:
                s = long_dots(
                    p_x, p_y, rows, cols, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
                )
            s = s * factor
            if HAS_BIAS:
                s += tl.load(p_bias + cols, mask=cols < M, other=0.0).to(tl.float32)[None, :] * LOG2E
            if edge:
                keep = (cols < M)[None, :]
                if EXCLUDE:
                    keep = keep & (cols[None, :] != (rows + excluded)[:, None])
                s = tl.where(keep, s, -float("inf"))
            if BOUNDED:
                total += tl.sum(tl.exp2(s), 1)
            else:
                new = tl.maximum(top, tl.max(s, 1))
                shift = tl.where(new == -float("inf"), 0.0, new)
                total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
                top = new
    if COLUMNS:
        total = tl.sum(sums, 0)
    if not BOUNDED:
        total = top + tl.log2(total)
    tl.store(p_rows + part.to(tl.int64) * N + rows, total, mask=rows < N)


@triton.jit
def lse_bwd_kernel(
    p_x, p_y, p_bias, p_gain, p_row_lse, p_row_grad, p_col_lse, p_col_grad,
    p_dx,  # [spans, N, D], divided by the gain
    p_sums,  # [spans, N] sums of G over the columns, if SUMS
    N, M, stride_x, stride_y, scale, excluded,
    span,  # tiles of columns per program
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,  # features of dx per program; all of them if rows stay on the chip
    ROWS: tl.constexpr, COLS: tl.constexpr, SUMS: tl.constexpr, BOUNDED: tl.constexpr, EXCLUDE: tl.constexpr,
    COL_BIAS: tl.constexpr, ROW_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Accumulate the gradient of a block of rows over a span of columns."""
    part, first = tl.program_id(1), tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    outs = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    factor = base2_scale(scale, p_gain, HAS_GAIN)
    features = tl.arange(0, BLOCK_D)
    if D <= BLOCK_D:
        x = load_tile(p_x, rows, features, N, stride_x, D, D != BLOCK_D, WIDEN)
    if ROW_BIAS:
        row_bias = tl.load(p_bias + rows, mask=rows < N, other=0.0).to(tl.float32) * LOG2E
    if ROWS:
        row_grad = tl.load(p_row_grad + rows, mask=rows < N, other=0.0)
        if not BOUNDED:
            row_lse = tl.load(p_row_lse + rows, mask=rows < N, other=0.0) * LOG2E
    dx = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(M, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        if D <= BLOCK_D:
            y = load_tile(p_y, cols, features, M, stride_y, D, D != BLOCK_D, WIDEN)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            s = long_dots(
                p_x, p_y, rows, cols, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
            )
            y = load_tile(p_y, cols, outs, M, stride_y, D, D % BLOCK_OUT != 0, WIDEN)
        s = s * factor
        if COL_BIAS:
            s += tl.load(p_bias + cols, mask=cols < M, other=0.0).to(tl.float32)[None, :] * LOG2E
        if ROW_BIAS:
            s += row_bias[:, None]
        if COLS:
            col_grad = tl.load(p_col_grad + cols, mask=cols < M, other=0.0)
            if not BOUNDED:
                col_lse = tl.load(p_col_lse + cols, mask=cols < M, other=0.0) * LOG2E
        if BOUNDED:
            if ROWS and COLS:
                grad = tl.exp2(s) * (row_grad[:, None] + col_grad[None, :])
            elif ROWS:
                grad = tl.exp2(s) * row_grad[:, None]
            else:
                grad = tl.exp2(s) * col_grad[None, :]
        else:
            grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if ROWS:
                grad += tl.exp2(s - row_lse[:, None]) * row_grad[:, None]
            if COLS:
                grad += tl.exp2(s - col_lse[None, :]) * col_grad[None, :]
        if at_edge(step * BLOCK_N, first, excluded, N, M, BLOCK_M, BLOCK_N, False, EXCLUDE):
            keep = (cols < M)[None, :]
            if EXCLUDE:
                keep = keep & (cols[None, :] != (rows + excluded)[:, None])
            grad = tl.where(keep, grad, 0.0)
        if SUMS:
            sums += tl.sum(grad, 1)
        dx = tl.dot(grad.to(y.dtype), y, dx, input_precision=PRECISION)
    places = (part.to(tl.int64) * N + rows)[:, None] * D + outs[None, :]
    tl.store(p_dx + places, dx * scale, mask=(rows < N)[:, None] & (outs < D)[None, :])
    if SUMS:
        tl.store(p_sums + part.to(tl.int64) * N + rows, sums, mask=rows < N)
