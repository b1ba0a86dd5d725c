"""The Triton kernels. ``launch.py`` launches them. The symbols are defined in cpu.py.

Forward: one program per block of rows, block of slices and view. Each knot's sums over the block have their own slot,
and torch adds the slots. Backward: one program per block of rows, part of the features and view, which goes over all
slices. So there are no atomics, and the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..similarity.triton import load_tile, long_dots


@triton.jit
def sums_kernel(
    p_x, p_y,  # rows [V, N, D] and slices [S, D]
    p_sums,  # [blocks of rows, V, 2, KNOTS - 1, S]
    N, M, stride_view, stride_x, stride_y, step,
    KNOTS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Sum the cosines and sines of a tile over its rows, at every knot."""
    block, view, views = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_x += view.to(tl.int64) * stride_view
    angle = step * long_dots(
        p_x, p_y, rows, cols, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
    )
    inside = (rows < N)[:, None]
    cosine, sine = tl.where(inside, tl.cos(angle), 0.0), tl.where(inside, tl.sin(angle), 0.0)
    double = 2 * cosine
    cosine_before = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + tl.where(inside, 1.0, 0.0)
    sine_before = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slot = p_sums + (block * views + view).to(tl.int64) * (2 * (KNOTS - 1) * M) + cols
    for k in range(KNOTS - 1):
        tl.store(slot + k * M, tl.sum(cosine, 0), mask=cols < M)
        tl.store(slot + (KNOTS - 1 + k) * M, tl.sum(sine, 0), mask=cols < M)
        cosine_next, sine_next = double * cosine - cosine_before, double * sine - sine_before
        cosine_before, sine_before = cosine, sine
        cosine, sine = cosine_next, sine_next


@triton.jit
def gradient_kernel(
    p_x, p_y,  # rows [V, N, D] and slices [S, D]
    p_coefficients,  # [V, 2, KNOTS - 1, S]
    p_dx,  # [V, N, D]
    N, M, stride_view, stride_x, stride_y, step,
    KNOTS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Accumulate the gradient of a block of rows over all slices."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    view = tl.program_id(2).to(tl.int64)
    p_x += view * stride_view
    p_coefficients += view * (2 * (KNOTS - 1) * M)
    dx = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        angle = step * long_dots(
            p_x, p_y, rows, cols, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
        )
        cosine = tl.cos(angle)
        b, b_later = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        d, d_later = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for down in range(KNOTS - 1):
            place = p_coefficients + (KNOTS - 2 - down) * M + cols
            alpha = tl.load(place, mask=cols < M, other=0.0)
            beta = tl.load(place + (KNOTS - 1) * M, mask=cols < M, other=0.0)
            b_now, d_now = alpha[None, :] + 2 * cosine * b - b_later, beta[None, :] + 2 * cosine * d - d_later
            b_later, d_later = b, d
            b, d = b_now, d_now
        of_angle = b * cosine - b_later + d * tl.sin(angle)
        y = load_tile(p_y, cols, outs, M, stride_y, D, D % BLOCK_OUT != 0, WIDEN)
        dx = tl.dot(of_angle.to(y.dtype), y, dx, input_precision=PRECISION)
    places = (view * N + rows)[:, None] * D + outs[None, :]
    tl.store(p_dx + places, dx * step, mask=(rows < N)[:, None] & (outs < D)[None, :])
