"""Row log-sum-exps over the columns of all ranks: local rows, gathered columns, exact gradients.

Forward: start to gather the columns, compute the block of this rank's own columns meanwhile, then join the parts.
Backward: every rank gathers the log-sum-exps and their gradients (2 numbers per row). Then it forms the whole gradient
of its own rows in one pass,

    dx_i = scale sum_j e_ij (a_i + a_j) x_j,   a = g exp(-lse)

So no N x D gradient is summed over ranks. This means less traffic, and the same bits in any order of arrival. If x and
y differ, the rows x of all ranks are gathered for the gradient of y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..collectives import Group, start_gather
from .op import kernels


def row_logsumexp_over_ranks(
    x: Tensor,
    y: Tensor,
    gain: Tensor | None,
    scale: float,
    exclude_self: bool,
    unit_norm: bool,
    backend: str,
    group: Group,
) -> Tensor:
    """Return ``log sum_j exp(scale gain <x_i, y_j>)`` [N] over the rows y_j of all ranks. ``y is x`` is symmetric."""
    apply = _Symmetric.apply if y is x else _Pair.apply
    operands = (x,) if y is x else (x, y)
    lse: Tensor = apply(*operands, gain, scale, exclude_self, unit_norm, kernels(backend), group)
    return lse


def _forward(ctx: Any, x: Tensor, y: Tensor, own: Any) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exps and the y of all ranks. ``own`` computes the block of this rank's own columns."""
    wait = start_gather(y, ctx.group)
    parts = [own()]
    all_y = wait()
    first = ctx.group.rank() * len(y)
    for others in (all_y[:first], all_y[first + len(y) :]):
        if len(others):
            options = {"scale": ctx.scale, "unit_norm": ctx.unit_norm}
            part, _ = ctx.kernels.pair_lse(x, others, None, ctx.gain, excluded=None, columns=False, **options)
            parts.append(part)
    return torch.stack(parts).logsumexp(0), all_y


def _gather_weights(lse: Tensor, grad: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    lse, grad = start_gather(torch.stack([lse, grad], dim=1), group)().unbind(1)
    return lse.contiguous(), grad.contiguous()


class _Symmetric(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor | None,
        scale: float,
        exclude_self: bool,
        unit_norm: bool,
        kernels: Any,
        group: Group,
    ) -> Tensor:
        ctx.gain, ctx.scale, ctx.unit_norm, ctx.kernels, ctx.group = gain, scale, unit_norm, kernels, group
        ctx.excluded = group.rank() * len(x) if exclude_self else None
        options = {"scale": scale, "exclude_self": exclude_self, "unit_norm": unit_norm}
        lse, all_x = _forward(ctx, x, x, lambda: kernels.self_lse(x, gain, **options)[0])
        ctx.save_for_backward(x, all_x, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, all_x, lse = ctx.saved_tensors
        rows = (lse, grad)
        dx, _, _ = ctx.kernels.pair_backward(
            x,
            all_x,
            None,
            ctx.gain,
            rows,
            _gather_weights(*rows, ctx.group),
            scale=ctx.scale,
            excluded=ctx.excluded,
            unit_norm=ctx.unit_norm,
            need_x=True,
            need_y=False,
        )
        # Half of <x, dx> is from this rank's rows with all columns, half from all rows with this rank's columns. Summed
        # over the ranks, both halves are equal.
        dgain = (x * dx).sum() / (2 * ctx.gain) if ctx.gain is not None and ctx.needs_input_grad[1] else None
        return dx.to(x.dtype), dgain, None, None, None, None, None


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        gain: Tensor | None,
        scale: float,
        exclude_self: bool,
        unit_norm: bool,
        kernels: Any,
        group: Group,
    ) -> Tensor:
        ctx.gain, ctx.scale, ctx.unit_norm, ctx.kernels, ctx.group = gain, scale, unit_norm, kernels, group
        rank = group.rank()
        ctx.excluded = (rank * len(y), rank * len(x)) if exclude_self else (None, None)
        options = {"scale": scale, "excluded": 0 if exclude_self else None, "unit_norm": unit_norm, "columns": False}
        lse, all_y = _forward(ctx, x, y, lambda: kernels.pair_lse(x, y, None, gain, **options)[0])
        ctx.save_for_backward(x, y, all_y, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, all_y, lse = ctx.saved_tensors
        of_x, of_y, of_gain, *_ = ctx.needs_input_grad
        of_gain = of_gain and ctx.gain is not None
        rows = (lse, grad)
        options = {"scale": ctx.scale, "unit_norm": ctx.unit_norm, "need_x": True, "need_y": False}
        dx = dy = dgain = None
        if of_x or of_gain:
            dx, _, _ = ctx.kernels.pair_backward(
                x, all_y, None, ctx.gain, rows, None, excluded=ctx.excluded[0], **options
            )
            dgain = (x * dx).sum() / ctx.gain if of_gain else None
        if of_y:
            all_x = start_gather(x, ctx.group)()
            cols = _gather_weights(*rows, ctx.group)
            dy, _, _ = ctx.kernels.pair_backward(
                y, all_x, None, ctx.gain, None, cols, excluded=ctx.excluded[1], **options
            )
        return (
            dx.to(x.dtype) if of_x and dx is not None else None,
            dy.to(y.dtype) if dy is not None else None,
            dgain,
            *[None] * 5,
        )
