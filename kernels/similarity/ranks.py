"""Row log-sum-exps over the columns of all ranks: local rows, gathered columns, exact gradients.

Forward: start to gather the columns, compute the block of this rank's own columns meanwhile, then join the parts.
Backward: every rank gathers the log-sum-exps and their gradients (2 numbers per row). Then it forms the whole gradient
of its own rows in one pass,

    dx_i = scale sum_j e_ij (a_i + a_j) x_j,   a = g exp(-lse)

So no N x D gradient is summed over ranks. This means less traffic, and the same bits in any order of arrival. If x and
y differ, the rows x of all ranks are gathered for the gradient of y. The views of a batch share their messages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..collectives import Group, start_gather
from .op import gain_gradient, pair_lse, pair_lse_backward, self_lse, times_gain

_Rows = tuple[Tensor, Tensor] | None


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
    if y is x:
        return view_logsumexps_over_ranks(x[None], gain, scale, exclude_self, unit_norm, backend, group)[0]
    lse: Tensor = _Pair.apply(x, y, gain, scale, exclude_self, unit_norm, backend, group)
    return lse


def view_logsumexps_over_ranks(
    views: Tensor,
    gain: Tensor | None,
    scale: float,
    exclude_self: bool,
    unit_norm: bool,
    backend: str,
    group: Group,
) -> Tensor:
    """Return the log-sum-exps [V, N] of every view's rows [V, N, D] over the same view's rows of all ranks."""
    lses: Tensor = _Symmetric.apply(views, gain, scale, exclude_self, unit_norm, backend, group)
    return lses


def _join(ctx: Any, x: Tensor, all_y: Tensor, own: Tensor, gain: Tensor | None) -> Tensor:
    """Return the log-sum-exps over the columns of all ranks. ``own`` are those over this rank's columns alone."""
    count = len(all_y) // ctx.group.size()
    first, parts = ctx.group.rank() * count, [own]
    for others in (all_y[:first], all_y[first + count :]):
        if len(others):
            part, *_ = pair_lse(x, others, None, gain, ctx.scale, None, ctx.unit_norm, False, False, ctx.backend)
            parts.append(part)
    return torch.stack(parts).logsumexp(0)


def _gradient(
    ctx: Any, x: Tensor, y: Tensor, gain: Tensor | None, rows: _Rows, cols: _Rows, excluded: int | None
) -> Tensor:
    """Return the gradient for x divided by the gain.

    ``rows`` and ``cols`` are the log-sum-exps of each side with their gradients.
    """
    none = x.new_empty(0)
    row, row_grad = rows or (none, None)
    col, col_grad = cols or (none, None)
    options = (ctx.scale, excluded, ctx.unit_norm, True, False, ctx.backend)
    dx: Tensor = pair_lse_backward(x, y, None, gain, row, col, row_grad, col_grad, *options)[0]
    return dx


def _gather_weights(lse: Tensor, grad: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    lse, grad = start_gather(torch.stack([lse, grad], dim=1), group)().unbind(1)
    return lse.contiguous(), grad.contiguous()


class _Symmetric(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        views: Tensor,
        gain: Tensor | None,
        scale: float,
        exclude_self: bool,
        unit_norm: bool,
        backend: str,
        group: Group,
    ) -> Tensor:
        ctx.scale, ctx.unit_norm, ctx.backend, ctx.group = scale, unit_norm, backend, group
        ctx.excluded = group.rank() * views.shape[1] if exclude_self else None
        wait = start_gather(views[None], group)
        own = [self_lse(x, gain, scale, exclude_self, unit_norm, backend)[0] for x in views]
        all_views = wait().transpose(0, 1).flatten(1, 2)
        lses = torch.stack([_join(ctx, *rows, gain) for rows in zip(views, all_views, own, strict=True)])
        ctx.save_for_backward(views, all_views, lses, gain)
        return lses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        views, all_views, lses, gain = ctx.saved_tensors
        weights = start_gather(torch.stack([lses, grad])[None], ctx.group)()  # [ranks, 2, V, N]
        all_lses, all_grads = weights.permute(1, 2, 0, 3).flatten(2)
        dx = torch.stack(
            [
                _gradient(ctx, x, all_x, gain, row, col, ctx.excluded)
                for x, all_x, row, col in zip(
                    views,
                    all_views,
                    zip(lses, grad.contiguous(), strict=True),
                    zip(all_lses, all_grads, strict=True),
                    strict=True,
                )
            ]
        )
        # Half of <x, dx> is from this rank's rows with all columns, half from all rows with this rank's columns. Summed
        # over the ranks, both halves are equal.
        dgain = gain_gradient(views, dx, gain) / 2 if ctx.needs_input_grad[1] else None
        return times_gain(dx, gain).to(views.dtype), dgain, None, None, None, None, None


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
        backend: str,
        group: Group,
    ) -> Tensor:
        ctx.scale, ctx.unit_norm, ctx.backend, ctx.group = scale, unit_norm, backend, group
        rank = group.rank()
        ctx.excluded = (rank * len(y), rank * len(x)) if exclude_self else (None, None)
        options = (scale, 0 if exclude_self else None, unit_norm, False, False, backend)
        wait = start_gather(y, group)
        own, *_ = pair_lse(x, y, None, gain, *options)
        all_y = wait()
        lse = _join(ctx, x, all_y, own, gain)
        ctx.save_for_backward(x, y, all_y, lse, gain)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, y, all_y, lse, gain = ctx.saved_tensors
        of_x, of_y, of_gain, *_ = ctx.needs_input_grad
        rows = (lse, grad)
        dx = dy = dgain = None
        if of_x or of_gain:
            dx = _gradient(ctx, x, all_y, gain, rows, None, ctx.excluded[0])
            dgain = gain_gradient(x, dx, gain) if of_gain else None
        if of_y:
            all_x = start_gather(x, ctx.group)()
            dy = _gradient(ctx, y, all_x, gain, None, _gather_weights(*rows, ctx.group), ctx.excluded[1])
        return (
            times_gain(dx, gain).to(x.dtype) if of_x and dx is not None else None,
            times_gain(dy, gain).to(y.dtype) if dy is not None else None,
            dgain,
            *[None] * 5,
        )
