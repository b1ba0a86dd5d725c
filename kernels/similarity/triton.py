"""The Triton kernels. ``launch.py`` launches them.

The symbols are defined in cpu.py. Everything is in base 2, with fp32 accumulators:

    s_ij = scale <x_i, y_j> + bias                         [BLOCK_M, BLOCK_N] tile, in registers only
    row_lse        rows_i = sum_j e^s_ij
    both_lse       rows_i = sum_j e^s_ij,   cols_j = sum_i e^s_ij
    weighted_sum   out_i = scale sum_j G_ij v_j,   G_ij = a_i e^(s_ij - lse_i) + b_j e^(s_ij - lse'_j)

A pointer that is None has no code: each use passes what it needs. All kernels have one program per block of rows and
span of columns. The tile of x stays on the chip, and tiles of y are read one after another. Each sum has its own slot,
``p_rows[span of columns, row]`` and ``p_cols[block of rows, column]``, and torch adds the slots. So there are no
atomics, and the same bits every time.

both_lse: the tile is transposed, [BLOCK_N, BLOCK_M]. Each step sums along the second axis, which stays within a quarter
of a warp. The sum along the first axis is taken once, at the end. A block has one tile of rows per launch, and each
launch adds to the slots of the previous one. If x is y, only spans on and above the diagonal run: their column sums are
the row sums of the spans below.

weighted_sum: one program per part of the features, too. The gradient of y is the same sum with x and y, and rows and
columns, exchanged. If x is y, G is symmetric and one pass is enough. The values v are y itself, or given.

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
def scores(
    p_x, p_y, x, y, rows, cols, N, M, stride_x, stride_y, factor, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return scores in base 2, from the tiles x and y if whole rows fit the chip."""
    if D <= BLOCK_D:
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    else:
        s = long_dots(p_x, p_y, rows, cols, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
    return s * factor


@triton.jit
def load_rows(p, rows, count, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr):
    """Load whole rows if they fit the chip, otherwise a part that is not used."""
    return load_tile(p, rows, tl.arange(0, BLOCK_D), count, stride, D, D != BLOCK_D, WIDEN)


@triton.jit
def base2_scale(scale, p_gain):
    """Return the factor from a dot product to a score in base 2."""
    factor = scale * LOG2E
    if p_gain is not None:
        factor = factor * tl.load(p_gain).to(tl.float32)
    return factor


@triton.jit
def load_numbers(p, places, count):
    """Load one number per row or column in fp32, 0 beyond the end."""
    return tl.load(p + places, mask=places < count, other=0.0).to(tl.float32)


@triton.jit
def meets(column, row, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return whether a tile has a score with column = row + offset."""
    own = row + offset
    return (own < column + BLOCK_N) & (column < own + BLOCK_M)


@triton.jit
def rounded(x):
    """Return fp32 numbers rounded to bf16. The interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


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
        edge = edge | meets(column, row, excluded, BLOCK_M, BLOCK_N)
    return edge


@triton.jit
def row_lse_kernel(
    p_x, p_y, p_bias, p_gain,
    p_rows,  # [spans, N] sums if BOUNDED, else log2 of the sums
    N, M, stride_x, stride_y, scale, excluded,
    span,  # tiles of columns per program
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sum the exponentials of a block of rows over a span of columns."""
    first, part = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    factor = base2_scale(scale, p_gain)
    rows = first + tl.arange(0, BLOCK_M)
    x = load_rows(p_x, rows, N, stride_x, D, BLOCK_D, WIDEN)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(M, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        edge = at_edge(step * BLOCK_N, first, excluded, N, M, BLOCK_M, BLOCK_N, False, EXCLUDE)
        y = load_rows(p_y, cols, M, stride_y, D, BLOCK_D, WIDEN)
        s = scores(
            p_x, p_y, x, y, rows, cols, N, M, stride_x, stride_y, factor, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
            WIDEN,
        )  # fmt: skip
        if p_bias is not None:
            s += load_numbers(p_bias, cols, M)[None, :] * LOG2E
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
    if not BOUNDED:
        total = top + tl.log2(total)
    tl.store(p_rows + part.to(tl.int64) * N + rows, total, mask=rows < N)


@triton.jit(do_not_specialize=["tile", "tiles"])
def both_lse_kernel(
    p_x, p_y, p_gain,
    p_rows,  # [spans, N] sums of bounded scores
    p_cols,  # [blocks of rows, M] sums; p_rows itself if SYMMETRIC
    N, M, stride_x, stride_y, scale, excluded,
    span,  # tiles of columns per program
    tile, tiles,  # of rows: the number of this one in its block, and their count
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SYMMETRIC: tl.constexpr, EXCLUDE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sum the exponentials of a tile of rows over a span of columns, and of the columns over the tile."""
    block, part = tl.program_id(0), tl.program_id(1)
    if SYMMETRIC:
        if part < block:
            return
    factor = base2_scale(scale, p_gain)
    first = (block * tiles + tile) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    x = load_rows(p_x, rows, N, stride_x, D, BLOCK_D, WIDEN)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(M, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        edge = at_edge(step * BLOCK_N, first, excluded, N, M, BLOCK_M, BLOCK_N, True, EXCLUDE)
        y = load_rows(p_y, cols, M, stride_y, D, BLOCK_D, WIDEN)
        s = scores(
            p_y, p_x, y, x, cols, rows, M, N, stride_y, stride_x, factor, D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            WIDEN,
        )  # fmt: skip
        e = tl.exp2(s)
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
    tl.store(p_rows + part.to(tl.int64) * N + rows, tl.sum(sums, 0), mask=rows < N)


@triton.jit
def weighted_sum_kernel(
    p_x, p_y,
    p_values,  # [M, D]; y if None
    p_gain,
    p_row_bias, p_col_bias,  # [N] and [M]
    p_part_bias,  # [parts, N], one row per ``part_rows`` columns
    p_row_lse, p_row_grad, p_col_lse, p_col_grad,
    p_other,  # g, added to the gradient of the other side: [M] for rows, [N] for columns
    p_energy,  # c: c s is added to the gradient of the same side
    p_positive,  # subtracted from G where column = row +- positive, before it is rounded
    p_out,  # [spans, N, D], divided by the gain
    p_sums,  # [spans, N] sums of G over the columns
    N, M, stride_x, stride_y, stride_values, scale,
    out_scale,  # of v
    excluded, positive, part_rows,
    span,  # tiles of columns per program
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,  # features of the result per program; all of them if rows stay on the chip
    BOUNDED: tl.constexpr, EXCLUDE: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Accumulate the values of a span of columns with the weights G, or the sums of G, of a block of rows."""
    part, first = tl.program_id(1), tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    outs = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    factor = base2_scale(scale, p_gain)
    x = load_rows(p_x, rows, N, stride_x, D, BLOCK_D, WIDEN)
    if p_row_bias is not None:
        row_bias = load_numbers(p_row_bias, rows, N) * LOG2E
    if p_row_grad is not None:
        row_grad = load_numbers(p_row_grad, rows, N)
        if not BOUNDED:
            row_lse = load_numbers(p_row_lse, rows, N) * LOG2E
        if p_energy is not None:
            energy = load_numbers(p_energy, rows, N) / LOG2E
    elif p_other is not None:
        other = load_numbers(p_other, rows, N)
    out = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(M, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        y = load_rows(p_y, cols, M, stride_y, D, BLOCK_D, WIDEN)
        s = scores(
            p_x, p_y, x, y, rows, cols, N, M, stride_x, stride_y, factor, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
            WIDEN,
        )  # fmt: skip
        if p_row_bias is not None:
            s += row_bias[:, None]
        if p_col_bias is not None:
            s += load_numbers(p_col_bias, cols, M)[None, :] * LOG2E
        if p_part_bias is not None:
            places = (cols // part_rows).to(tl.int64)[None, :] * N + rows[:, None]
            s += tl.load(p_part_bias + places, mask=(rows < N)[:, None] & (cols < M)[None, :], other=0.0) * LOG2E
        if BOUNDED:
            if p_row_grad is None:
                weight = load_numbers(p_col_grad, cols, M)[None, :]
            elif p_col_grad is None:
                weight = row_grad[:, None]
            else:
                weight = row_grad[:, None] + load_numbers(p_col_grad, cols, M)[None, :]
            grad = tl.exp2(s) * weight
        else:
            grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if p_row_grad is not None:
                weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + row_grad[:, None]
                if p_other is not None:
                    weight += load_numbers(p_other, cols, M)[None, :]
                if p_energy is not None:
                    weight += energy[:, None] * s
                grad += tl.exp2(s - row_lse[:, None]) * weight
            if p_col_grad is not None:
                weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + load_numbers(p_col_grad, cols, M)[None, :]
                if p_row_grad is None:
                    if p_other is not None:
                        weight += other[:, None]
                    if p_energy is not None:
                        weight += (load_numbers(p_energy, cols, M) / LOG2E)[None, :] * s
                grad += tl.exp2(s - (load_numbers(p_col_lse, cols, M) * LOG2E)[None, :]) * weight
        column = step * BLOCK_N
        # Without bounds and exclusion a branch takes more shared memory than the comparisons take time.
        edge = True
        if BOUNDED or EXCLUDE:
            edge = at_edge(column, first, excluded, N, M, BLOCK_M, BLOCK_N, False, EXCLUDE)
        if p_positive is not None:
            edge = edge | meets(column, first, positive, BLOCK_M, BLOCK_N)
            edge = edge | meets(column, first, -positive, BLOCK_M, BLOCK_N)
        if edge:
            distance = cols[None, :] - rows[:, None]
            keep = (cols < M)[None, :]
            if EXCLUDE:
                keep = keep & (distance != excluded)
            grad = tl.where(keep, grad, 0.0)
            if p_positive is not None:
                own = (distance == positive) | (distance == -positive)
                grad -= tl.where(own, tl.load(p_positive), 0.0)
        if p_sums is not None:
            sums += tl.sum(grad, 1)
        if p_out is not None:
            if p_values is not None:
                v = load_tile(p_values, cols, outs, M, stride_values, D, D % BLOCK_OUT != 0, WIDEN)
            elif D <= BLOCK_D:
                v = y
            else:
                v = load_tile(p_y, cols, outs, M, stride_y, D, D % BLOCK_OUT != 0, WIDEN)
            if WIDEN:
                if p_x.dtype.element_ty == tl.bfloat16:
                    grad = rounded(grad)
            out = tl.dot(grad.to(v.dtype), v, out, input_precision=PRECISION)
    rows64 = part.to(tl.int64) * N + rows
    if p_out is not None:
        places = p_out + rows64[:, None] * D + outs[None, :]
        inside = (rows < N)[:, None] & (outs < D)[None, :]
        out = out * out_scale
        if ADD:
            out += tl.load(places, mask=inside, other=0.0)
        tl.store(places, out, mask=inside)
    if p_sums is not None:
        tl.store(p_sums + rows64, sums, mask=rows < N)
