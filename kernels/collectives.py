"""Differentiable collectives.

All of them follow one convention. Every rank computes the loss of its own rows, or the same global loss. The trainer
then *averages* the parameter gradients over the ranks, as DeepSpeed and DDP do. So backward sums the gradients of all
ranks' losses, and the average equals the gradient of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
# torch 2.14 renamed it, and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_gather(x, group)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[ctx.group.rank()], None


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce_mean(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce_mean(grad, ctx.group), None


def _all_reduce_mean(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total / group.size()


def start_gather(x: Tensor, group: Group) -> Callable[[], Tensor]:
    """Start to concatenate the rows of all ranks, without autograd. The returned function waits and returns them."""
    gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    work: Any = _all_gather(gathered, x.contiguous(), group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return gathered

    return wait


def gather_rows(x: Tensor, group: Group | None) -> Tensor:
    """Concatenate the rows ``x`` [N, ...] of all ranks, in rank order, into [ranks * N, ...]."""
    if group is None:
        return x
    gathered: Tensor = _GatherRows.apply(x, group)
    return gathered


def mean_over_ranks(x: Tensor, group: Group | None) -> Tensor:
    """Return the mean of ``x`` over the ranks. Every rank gets the same tensor."""
    if group is None:
        return x
    mean: Tensor = _MeanOverRanks.apply(x, group)
    return mean


def first_row(x: Tensor, group: Group | None) -> int:
    """Return the index of this rank's first row in ``gather_rows(x, group)``."""
    return 0 if group is None else group.rank() * x.shape[0]
