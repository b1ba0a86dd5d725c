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
from ..similarity.launch import adjacent, capability, kernel_options, on_device, packed, splits
from ..similarity.tiles import Tile, attention_tile, prototype_tile
from .problem import Problem, Results
from .triton import attend_kernel, columns_kernel, rows_kernel


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
        energies = (h * _rows_pass(h, w, lse, torch.ones_like(lse), scale)).sum(1)
        value = torch.dot(weights, lse - energies)
    if problem.marginal:
        marginal = lse.new_empty(len(w))
        _columns(h, w, lse, scale, weights=problem.mean_weights(lse.dtype).flatten(), marginal=marginal)
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
    of_energy = of_columns = None
    if problem.teacher is None:
        of_energy = -of_rows
        of_rows = of_rows * energies
    if problem.marginal:
        of_columns = problem.mean_weights(lse.dtype).flatten(), marginal_grad.contiguous()
        sums = torch.ones_like(lse), of_columns[1]
        means = _rows_pass(h, w, lse, torch.zeros_like(lse), scale, of_columns=sums, gradient=False)
        of_rows = torch.addcmul(of_rows, of_columns[0], means, value=-1)
    dh, dw = lse.new_empty(0, 0, 0), lse.new_empty(w.shape if problem.need_prototypes else (0, 0))
    if problem.need_student:
        dh = _rows_pass(h, w, lse, of_rows, scale, of_columns=of_columns, of_energy=of_energy)
        dh = dh.view(problem.student.shape)
        if problem.teacher is not None:
            dh.addcmul_(targets, loss_grad, value=-scale)
    if not problem.need_prototypes:
        return dh, dw
    taught = None
    if problem.teacher is not None and problem.teacher_prototypes is not None:
        queries, keys = _alike(problem.teacher.flatten(0, 1), problem.teacher_prototypes)
        learners = problem.weighted(_of_others(problem.student.float(), len(problem.teacher), problem.own))
        of_means = (learners * (loss_grad * -scale)).flatten(0, 1).to(h.dtype)
        taught = (queries, keys, problem.bias, teacher_lse, adjacent(of_means))
    _columns(
        h,
        w,
        lse,
        scale,
        weights=None if of_columns is None else of_columns[0],
        of_rows=of_rows,
        marginal_grad=None if of_columns is None else of_columns[1],
        of_energy=of_energy,
        taught=taught,
        teacher_scale=problem.teacher_scale,
        dw=dw,
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
    grid, span = _grid(queries, len(keys), tile)
    top, total = (queries.new_empty(grid[1], n, dtype=torch.float32) for _ in range(2))
    out = queries.new_empty(grid[1], n, dim, dtype=torch.float32)
    part_rows = n if bias is None else n // len(bias)
    with on_device(queries):
        attend_kernel[grid](
            queries, keys, values, packed(bias), top, total, out,
            n, len(keys), queries.stride(0), keys.stride(0), values.stride(0), scale, part_rows, span,
            D=dim, **_blocks(tile), HAS_BIAS=bias is not None, **kernel_options(tile),
        )  # fmt: skip
    highest = top.amax(0)
    share = (top - highest).exp2_()
    total = (total * share).sum(0)
    lse = (highest + total.log2()) * math.log(2)
    return (out * share[:, :, None]).sum(0) / total[:, None], lse


def _rows_pass(
    h: Tensor,
    w: Tensor,
    lse: Tensor,
    of_rows: Tensor,
    scale: float,
    *,
    of_columns: tuple[Tensor, Tensor] | None = None,
    of_energy: Tensor | None = None,
    gradient: bool = True,
) -> Tensor:
    """Return ``scale G w`` [N, D], or with ``gradient=False`` the sums of G [N], for G = P (a + r g + c s)."""
    n, dim = h.shape
    tile = prototype_tile(dim, h.dtype, capability(h))
    grid, span = _grid(h, len(w), tile, outs=gradient)
    r, g = (None, None) if of_columns is None else of_columns
    dh = h.new_empty(grid[1], n, dim if gradient else 0, dtype=torch.float32)
    sums = h.new_empty(grid[1], 0 if gradient else n, dtype=torch.float32)
    with on_device(h):
        rows_kernel[grid](
            h, w, lse, of_rows, r, g, of_energy, dh, sums, n, len(w), h.stride(0), w.stride(0), scale, span,
            D=dim, **_blocks(tile), MARGINAL=of_columns is not None, ENERGY=of_energy is not None, GRADIENT=gradient,
            **kernel_options(tile),
        )  # fmt: skip
    return (dh if gradient else sums).sum(0)


def _columns(
    h: Tensor,
    w: Tensor,
    lse: Tensor,
    scale: float,
    *,
    weights: Tensor | None,
    of_rows: Tensor | None = None,
    marginal_grad: Tensor | None = None,
    of_energy: Tensor | None = None,
    taught: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor] | None = None,
    teacher_scale: float = 1.0,
    dw: Tensor | None = None,
    marginal: Tensor | None = None,
) -> None:
    """Write ``dw`` [K, D] or ``marginal`` [K]."""
    dim = h.shape[1]
    tile = prototype_tile(dim, h.dtype, capability(h))
    outs = 1 if dw is None else triton.cdiv(dim, tile.block_out)
    q, v, bias, teacher_lse, attended_grad = taught or (h, w, None, None, h)
    with on_device(h):
        columns_kernel[(triton.cdiv(len(w), tile.block_m), outs)](
            w, h, lse, of_rows, weights, marginal_grad, of_energy,
            v, q, packed(bias), teacher_lse, attended_grad, dw, marginal,
            len(w), len(h), len(q), w.stride(0), h.stride(0), v.stride(0), q.stride(0), attended_grad.stride(0),
            scale, teacher_scale, len(q) if bias is None else len(q) // len(bias),
            D=dim, **_blocks(tile), MARGINAL=marginal_grad is not None, ENERGY=of_energy is not None,
            GRADIENT=dw is not None, TEACHER=taught is not None, HAS_BIAS=bias is not None, **kernel_options(tile),
        )  # fmt: skip


def _grid(rows: Tensor, prototypes: int, tile: Tile, *, outs: bool = True) -> tuple[tuple[int, int, int], int]:
    """Return the grid (blocks of rows, spans of prototypes, parts of the features), and the tiles per span."""
    n, dim = rows.shape
    blocks, tiles = triton.cdiv(n, tile.block_m), triton.cdiv(prototypes, tile.block_n)
    parts = triton.cdiv(dim, tile.block_out) if outs else 1
    span = triton.cdiv(tiles, splits(rows, blocks * parts, tiles))
    return (blocks, triton.cdiv(tiles, span), parts), span


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d, "BLOCK_OUT": tile.block_out}
