"""The Triton kernels of the prototypes. ``launch.py`` launches them.

The symbols are defined in cpu.py. Everything is in base 2, with fp32 accumulators. The similarity kernels compute the
student's log-sum-exp. There are three more kernels:

    attend     a block of teacher rows over a span of prototypes: o with a running maximum, as in attention
    rows       a block of student rows over a span of prototypes: sums of G, and G w
    columns    a block of prototypes over all rows: m = r^T P; or dw = scale G^T h + p^T do, student first, then teacher

There are few rows and many prototypes. So the first two split the prototypes into spans, and torch joins the results.
The third has one program per block of prototypes, which writes dw once. There are no atomics, so the bits are the same
every time.
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


@triton.jit
def rows_kernel(
    p_h, p_w, p_lse,
    p_a, p_r, p_g, p_c,  # G = P (a_i + r_i g_k + c_i s_ik), the last two if MARGINAL and ENERGY
    p_dh,  # [spans, N, D] if GRADIENT
    p_sums,  # [spans, N] otherwise
    N, K, stride_h, stride_w, scale, span,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    MARGINAL: tl.constexpr, ENERGY: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Accumulate G w, or the sums of G, of a block of student rows over a span of prototypes."""
    part = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    features = tl.arange(0, BLOCK_D)
    factor = scale * LOG2E
    if D <= BLOCK_D:
        h = load_tile(p_h, rows, features, N, stride_h, D, D != BLOCK_D, WIDEN)
    lse = tl.load(p_lse + rows, mask=rows < N, other=0.0) * LOG2E
    a = tl.load(p_a + rows, mask=rows < N, other=0.0)
    if MARGINAL:
        r = tl.load(p_r + rows, mask=rows < N, other=0.0)
    if ENERGY:
        c = tl.load(p_c + rows, mask=rows < N, other=0.0) / LOG2E
    dh = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(K, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        if D <= BLOCK_D:
            w = load_tile(p_w, cols, features, K, stride_w, D, D != BLOCK_D, WIDEN)
            s = tl.dot(h, tl.trans(w), input_precision=PRECISION)
        else:
            s = long_dots(
                p_h, p_w, rows, cols, N, K, stride_h, stride_w, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
            )
            if GRADIENT:
                w = load_tile(p_w, cols, outs, K, stride_w, D, D % BLOCK_OUT != 0, WIDEN)
        s = s * factor
        grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + a[:, None]
        if MARGINAL:
            grad += r[:, None] * tl.load(p_g + cols, mask=cols < K, other=0.0)[None, :]
        if ENERGY:
            grad += c[:, None] * s
        grad = tl.where((cols < K)[None, :], grad * tl.exp2(s - lse[:, None]), 0.0)
        if GRADIENT:
            dh = tl.dot(grad.to(w.dtype), w, dh, input_precision=PRECISION)
        else:
            sums += tl.sum(grad, 1)
    rows64 = part.to(tl.int64) * N + rows
    if GRADIENT:
        mask = (rows < N)[:, None] & (outs < D)[None, :]
        tl.store(p_dh + rows64[:, None] * D + outs[None, :], dh * scale, mask=mask)
    else:
        tl.store(p_sums + rows64, sums, mask=rows < N)


@triton.jit
def columns_kernel(
    p_w, p_h, p_lse, p_a, p_r, p_g, p_c,
    p_v, p_q, p_bias, p_teacher_lse, p_do,  # the teacher's part, if TEACHER
    p_dw,  # [K, D] if GRADIENT
    p_marginal,  # [K] otherwise
    K, N, T, stride_w, stride_h, stride_v, stride_q, stride_do, scale, teacher_scale, part_rows,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_OUT: tl.constexpr,
    MARGINAL: tl.constexpr, ENERGY: tl.constexpr, GRADIENT: tl.constexpr, TEACHER: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Accumulate the gradient of a block of prototypes over all rows, or their weighted marginal."""
    ks = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    features = tl.arange(0, BLOCK_D)
    factor = scale * LOG2E
    if D <= BLOCK_D:
        w = load_tile(p_w, ks, features, K, stride_w, D, D != BLOCK_D, WIDEN)
    if MARGINAL and GRADIENT:
        g = tl.load(p_g + ks, mask=ks < K, other=0.0)
    dw = tl.zeros([BLOCK_M, BLOCK_OUT], tl.float32)
    marginal = tl.zeros([BLOCK_M], tl.float32)
    for step in range(0, tl.cdiv(N, BLOCK_N)):
        rows = step * BLOCK_N + tl.arange(0, BLOCK_N)
        if D <= BLOCK_D:
            h = load_tile(p_h, rows, features, N, stride_h, D, D != BLOCK_D, WIDEN)
            s = tl.dot(w, tl.trans(h), input_precision=PRECISION)
        else:
            s = long_dots(p_w, p_h, ks, rows, K, N, stride_w, stride_h, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN)
            if GRADIENT:
                h = load_tile(p_h, rows, outs, N, stride_h, D, D % BLOCK_OUT != 0, WIDEN)
        s = s * factor
        p = tl.exp2(s - (tl.load(p_lse + rows, mask=rows < N, other=0.0) * LOG2E)[None, :])
        p = tl.where((rows < N)[None, :], p, 0.0)
        if GRADIENT:
            grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + tl.load(p_a + rows, mask=rows < N, other=0.0)[None, :]
            if MARGINAL:
                grad += g[:, None] * tl.load(p_r + rows, mask=rows < N, other=0.0)[None, :]
            if ENERGY:
                grad += (tl.load(p_c + rows, mask=rows < N, other=0.0) / LOG2E)[None, :] * s
            dw = tl.dot((grad * p).to(h.dtype), h, dw, input_precision=PRECISION)
        else:
            marginal += tl.sum(p * tl.load(p_r + rows, mask=rows < N, other=0.0)[None, :], 1)
    if GRADIENT:
        dw = dw * scale
        if TEACHER:
            if D <= BLOCK_D:
                v = load_tile(p_v, ks, features, K, stride_v, D, D != BLOCK_D, WIDEN)
            for step in range(0, tl.cdiv(T, BLOCK_N)):
                rows = step * BLOCK_N + tl.arange(0, BLOCK_N)
                if D <= BLOCK_D:
                    q = load_tile(p_q, rows, features, T, stride_q, D, D != BLOCK_D, WIDEN)
                    t = tl.dot(v, tl.trans(q), input_precision=PRECISION)
                else:
                    t = long_dots(
                        p_v, p_q, ks, rows, K, T, stride_v, stride_q, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, WIDEN
                    )
                t = t * (teacher_scale * LOG2E)
                if HAS_BIAS:
                    places = (rows // part_rows).to(tl.int64)[None, :] * K + ks[:, None]
                    t += tl.load(p_bias + places, mask=(rows < T)[None, :] & (ks < K)[:, None], other=0.0) * LOG2E
                p = tl.exp2(t - (tl.load(p_teacher_lse + rows, mask=rows < T, other=0.0) * LOG2E)[None, :])
                p = tl.where((rows < T)[None, :], p, 0.0)
                do = load_tile(p_do, rows, outs, T, stride_do, D, D % BLOCK_OUT != 0, WIDEN)
                dw = tl.dot(p.to(do.dtype), do, dw, input_precision=PRECISION)
        places = ks.to(tl.int64)[:, None] * D + outs[None, :]
        tl.store(p_dw + places, dw, mask=(ks < K)[:, None] & (outs < D)[None, :])
    else:
        tl.store(p_marginal + ks, marginal, mask=ks < K)
