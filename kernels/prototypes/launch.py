"""Launch the Triton kernels of the prototypes. The functions have the signatures of cpu.py.

If rows and prototypes have different types, both are converted to fp32. So is fp16, because the product of a
probability and a gradient is below its smallest number. For the current device see similarity/launch.py.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ..similarity import launch as similarity
from ..similarity.launch import adjacent, capability, kernel_options, on_device, packed, sizes, spans_of, weighted_sum
from ..similarity.tiles import Tile, attention_tile, prototype_tile
from .problem import Problem, Results
from .triton import attend_kernel


def loss(problem: Problem) -> Results:
    """Like :func:`cpu.loss`.

    Saved are the student's log-sum-exps and sums of P s, the teacher's log-sum-exps, and Q w: sums of o = p w.

    The teacher's probabilities sum to 1, so its part of the cross-entropy is ``-scale <h, o>``, which needs no scores.
    """
    rows, scale = problem.student.flatten(0, 1), problem.student_scale
    h, w = _alike(rows, problem.prototypes)
    lse, *_ = similarity.pair_lse(h, w, None, None, scale=scale, excluded=None, unit_norm=False, columns=False)
    weights = problem.row_weights(lse.dtype).view(-1)
    # One tensor for all absent results would alias the operator's outputs.
    marginal, energies, teacher_lse = (lse.new_empty(0) for _ in range(3))
    targets = lse.new_empty(0, 0, 0)
    if problem.teacher is not None and problem.teacher_prototypes is not None:
        # The prototypes of the caller, not w: a learnt temperature makes the rows and w fp32. That would widen the
        # values only, and tiles of two types need more shared memory than the chip has.
        queries, keys, values = _alike(problem.teacher.flatten(0, 1), problem.teacher_prototypes, problem.prototypes)
        means, teacher_lse = _attend(queries, keys, values, problem.bias, problem.teacher_scale)
        targets = problem.weighted(_of_others(means.view(problem.teacher.shape), len(problem.student), problem.own))
        value = torch.sub(torch.dot(weights, lse), (problem.student * targets).sum(), alpha=scale)
    else:  # sum_k P_ik s_ik = <h_i, scale sum_k P_ik w_k>
        energies = (h * weighted_sum(h, w, _tile(h), scale, rows=(lse, torch.ones_like(lse)))[0]).sum(1)
        value = torch.dot(weights, lse - energies)
    if problem.marginal:
        each = problem.mean_weights(lse.dtype).flatten()
        _, marginal = weighted_sum(w, h, _tile(h), scale, cols=(lse, each), result=False, sums=True)
    return value, marginal, lse, energies, teacher_lse, targets


def shapes(problem: Problem) -> Results:
    """Return new tensors like the results of :func:`loss`."""
    rows, taught = problem.rows, problem.teacher is not None
    teachers = 0 if problem.teacher is None else problem.teacher.shape[0] * problem.teacher.shape[1]
    marginal = problem.prototypes.shape[0] if problem.marginal else 0
    of_targets = tuple(problem.student.shape) if taught else (0, 0, 0)
    sizes: tuple[tuple[int, ...], ...] = ((), (marginal,), (rows,), (0 if taught else rows,), (teachers,), of_targets)
    value, mean, lse, energies, teacher_lse, targets = (
        problem.student.new_empty(size, dtype=torch.float32) for size in sizes
    )
    return value, mean, lse, energies, teacher_lse, targets


def backward(problem: Problem, saved: list[Tensor], loss_grad: Tensor, marginal_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Like :func:`cpu.backward`."""
    lse, energies, teacher_lse, targets = saved
    rows, scale = problem.student.flatten(0, 1), problem.student_scale
    h, w = _alike(rows, problem.prototypes)
    of_rows = problem.row_weights(lse.dtype).view(-1) * loss_grad
    of_columns, of_energy, tile = None, None, _tile(h)
    if problem.teacher is None:
        of_energy = -of_rows
        of_rows = of_rows * energies
    if problem.marginal:
        # G_ik = P_ik (a_i + m_i g_k) = exp(s_ik - lse_i + log m_i) (a_i / m_i + g_k). Rows of weight 0 have G = 0.
        each, of_columns = problem.mean_weights(lse.dtype).flatten(), marginal_grad
        divisor = torch.where(each > 0, each, 1)
        none = lse, torch.zeros_like(lse)
        means = weighted_sum(h, w, tile, scale, rows=none, other=of_columns, result=False, sums=True)[1]
        lse, of_rows = lse - each.log(), of_rows / divisor - means
        of_energy = None if of_energy is None else of_energy / divisor
    dh, dw = lse.new_empty(0, 0, 0), lse.new_empty(0, 0)
    if problem.need_student:
        dh, _ = weighted_sum(h, w, tile, scale, rows=(lse, of_rows), other=of_columns, energy=of_energy)
        dh = dh.view(problem.student.shape)
        if problem.teacher is not None:
            dh.addcmul_(targets, loss_grad, value=-scale)
    if problem.need_prototypes:
        dw, _ = weighted_sum(w, h, tile, scale, cols=(lse, of_rows), other=of_columns, energy=of_energy)
        if problem.teacher is not None and problem.teacher_prototypes is not None:
            q, v = _alike(problem.teacher.flatten(0, 1), problem.teacher_prototypes)
            learners = problem.weighted(_of_others(problem.student.float(), len(problem.teacher), problem.own))
            of_means = adjacent((learners * (loss_grad * -scale)).flatten(0, 1).to(q.dtype))
            weights = teacher_lse, torch.ones_like(teacher_lse)
            weighted_sum(
                v,
                q,
                attention_tile(q.shape[1], q.dtype, capability(q)),  # the bias takes registers, too
                problem.teacher_scale,
                values=of_means,
                part_bias=problem.bias,
                cols=weights,
                out=dw,
            )
    return dh, dw


def _of_others(rows: Tensor, views: int, own: bool) -> Tensor:
    """Return for each of the other side's ``views`` the sum of the rows [V, B, D] that it is paired with."""
    if own:
        return rows
    sums = rows.sum(0).repeat(views, 1, 1)
    sums[: len(rows)] -= rows[:views]
    return sums


def _alike(*factors: Tensor) -> tuple[Tensor, ...]:
    """Return all factors in one type that the kernels can multiply, with adjacent features."""
    if {factor.dtype for factor in factors} not in ({torch.float32}, {torch.bfloat16}):
        factors = tuple(factor.float() for factor in factors)
    return tuple(map(adjacent, factors))


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    n, dim = queries.shape
    tile = attention_tile(dim, queries.dtype, capability(queries))
    parts = triton.cdiv(dim, tile.block_out)
    blocks, span, spans = spans_of(queries, len(keys), tile, parts)
    top, total = (queries.new_empty(spans, n, dtype=torch.float32) for _ in range(2))
    out = queries.new_empty(spans, n, dim, dtype=torch.float32)
    with on_device(queries):
        attend_kernel[(blocks, spans, parts)](
            queries, keys, values, packed(bias), top, total, out,
            n, len(keys), queries.stride(0), keys.stride(0), values.stride(0), scale,
            n if bias is None else n // len(bias), span, **sizes(queries, tile), BLOCK_OUT=tile.block_out,
            HAS_BIAS=bias is not None, **kernel_options(tile),
        )  # fmt: skip
    highest = top.amax(0)
    share = (top - highest).exp2_()
    total = (total * share).sum(0)
    lse = (highest + total.log2()) * math.log(2)
    return (out * share[:, :, None]).sum(0) / total[:, None], lse


def _tile(rows: Tensor) -> Tile:
    return prototype_tile(rows.shape[1], rows.dtype, capability(rows))
