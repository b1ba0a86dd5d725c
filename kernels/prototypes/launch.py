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
from .cpu import Terms
from .triton import attend_kernel, columns_kernel, rows_kernel


def terms(
    student: Tensor,
    teacher: Tensor | None,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    *,
    student_scale: float,
    teacher_scale: float,
    energy: bool,
) -> Terms:
    """Like :func:`cpu.terms`, but nothing is saved."""
    h, w = _alike(student, student_prototypes)
    lse, _ = similarity.pair_lse(h, w, None, None, scale=student_scale, excluded=None, unit_norm=False, columns=False)
    # One tensor for all absent terms would alias the operator's outputs.
    attended, teacher_lse, marginal, energies = (lse.new_empty(0) for _ in range(4))
    if teacher is not None and teacher_prototypes is not None:
        # The prototypes of the caller, not w: a learnt temperature makes the rows and w fp32. That would widen the
        # values only, and tiles of two types need more shared memory than the chip has.
        queries, keys, values = _alike(teacher, teacher_prototypes, student_prototypes)
        attended, teacher_lse = _attend(queries, keys, values, bias, teacher_scale)
    if weights is not None:
        marginal = lse.new_empty(len(w))
        _columns(h, w, lse, student_scale, weights=weights.contiguous(), marginal=marginal)
    if energy:  # sum_k P_ik s_ik = <h_i, scale sum_k P_ik w_k>
        energies = (h * _rows_pass(h, w, lse, torch.ones_like(lse), student_scale)).sum(1)
    kept = lse.new_empty(0, 0)
    return lse, attended, teacher_lse, marginal, energies, kept, kept.clone()


def backward(
    student: Tensor,
    teacher: Tensor | None,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    energies: Tensor,
    kept: Tensor,
    kept_teacher: Tensor,
    lse_grad: Tensor | None,
    attended_grad: Tensor | None,
    marginal_grad: Tensor | None,
    energy_grad: Tensor | None,
    *,
    student_scale: float,
    teacher_scale: float,
    need_student: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    """Like :func:`cpu.backward`."""
    h, w = _alike(student, student_prototypes)
    weights, marginal_grad, energy_grad = packed(weights), packed(marginal_grad), packed(energy_grad)
    of_rows = torch.zeros_like(lse) if lse_grad is None else lse_grad.contiguous()
    if weights is None:
        marginal_grad = None
    if marginal_grad is not None and weights is not None:
        ones = torch.ones_like(lse)
        zeros = torch.zeros_like(lse)
        mean_grad = _rows_pass(h, w, lse, zeros, student_scale, of_columns=(ones, marginal_grad), gradient=False)
        of_rows = of_rows - weights * mean_grad
    if energy_grad is not None:
        of_rows = of_rows + energy_grad * (1 - energies)
    of_columns = None if marginal_grad is None or weights is None else (weights, marginal_grad)
    dh, dw = lse.new_empty(0), lse.new_empty(w.shape if need_prototypes else (0,))
    if need_student:
        dh = _rows_pass(h, w, lse, of_rows, student_scale, of_columns=of_columns, of_energy=energy_grad)
    if not need_prototypes:
        return dh, dw
    taught = None
    if attended_grad is not None and teacher is not None and teacher_prototypes is not None:
        queries, keys = _alike(teacher, teacher_prototypes)
        taught = (queries, keys, bias, teacher_lse, adjacent(attended_grad.to(h.dtype)))
    _columns(
        h,
        w,
        lse,
        student_scale,
        weights=weights,
        of_rows=of_rows,
        marginal_grad=marginal_grad,
        of_energy=energy_grad,
        taught=taught,
        teacher_scale=teacher_scale,
        dw=dw,
    )
    return dh, dw


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
