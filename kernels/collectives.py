"""Differentiable collectives.

All of them follow one convention. Every rank computes the loss of its own rows, or the same global loss. The trainer
then *averages* the parameter gradients over the ranks, as DeepSpeed and DDP do. So backward sums the gradients of all
ranks' losses, and the average equals the gradient of one process with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup
_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
_NAMED = 8  # ranks per size that a message names
# torch 2.14 renamed it, and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_gather(x, group)()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = _all_reduce_sum(grad, ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce_mean(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce_mean(grad, ctx.group), None


def all_reduce_mean(x: Tensor, group: Group | None) -> Tensor:
    """Return the mean of ``x`` over the ranks, without autograd."""
    return x if group is None else _all_reduce_sum(x, group) / group.size()


def _all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Return the sum of ``x`` over the ranks. x stays as it is: autograd gives one gradient to several branches."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def start_gather(x: Tensor, group: Group) -> Callable[[], Tensor]:
    """Start to concatenate the rows of all ranks, without autograd. The returned function waits and returns them."""
    gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    work: Any = _all_gather(gathered, x.contiguous(), group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return gathered

    return wait


def permute_rows(x: Tensor, order: Tensor, group: Group | None) -> Tensor:
    """Return this rank's part of ``gather_rows(x)[order]``, without autograd. Every row is sent to one rank only.

    All ranks must have equal x [B, ...] and the same permutation ``order`` [ranks * B], on the CPU.
    ``order.argsort()`` takes the rows back.
    """
    if group is None:
        return x[_on_device(order, x.device)]
    count = len(x)
    own = slice(group.rank() * count, (group.rank() + 1) * count)
    places, sources = order.argsort()[own], order[own] // count  # the target of each own row, the rank of each wanted
    sent, received = places.argsort(), sources.argsort(stable=True)  # by rank, and in the target's order
    sending = x[_on_device(sent, x.device)].contiguous()
    rows = torch.empty_like(sending)
    from_each, to_each = (_counts(ranks, group.size()) for ranks in (sources, places // count))
    dist.all_to_all_single(rows, sending, from_each, to_each, group=group)
    return rows[_on_device(received.argsort(), x.device)]


def _on_device(indices: Tensor, device: torch.device) -> Tensor:
    """Copy indices to the device. The host does not wait."""
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices


def _counts(numbers: Tensor, size: int) -> list[int]:
    """Return how often each of the numbers 0 to size - 1 occurs."""
    counts: list[int] = torch.zeros(size, dtype=torch.int64).index_add_(0, numbers, torch.ones_like(numbers)).tolist()
    return counts


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


def ranks_of(group: Group | None) -> int:
    """Return the number of ranks of a group, 1 for None."""
    return 1 if group is None else group.size()


def first_row(x: Tensor, group: Group | None) -> int:
    """Return the index of this rank's first row in ``gather_rows(x, group)``."""
    return 0 if group is None else group.rank() * x.shape[0]


def check_equal_batches(name: str, group: Group | None, *rows: Tensor) -> None:
    """Raise ValueError, which names the caller ``name``, on all ranks if a tensor's shape or type differs between them.

    A collective with unequal shapes would abort the process or wait for ever, and a mean over ranks would be wrong.
    Every rank must pass the same number of tensors, of any shape. The cost is one gather of 4 numbers per tensor, which
    the host reads. On a GPU it waits for them, unless the group has a backend for the CPU.
    """
    if group is None or not rows or isinstance(rows[0], FakeTensor):  # a group of fake tensors sends nothing
        return
    batches = _batches_of_all_ranks(rows, group)
    if any(batch != batches[0] for batch in batches):
        described = [" and ".join(_describe(*code) for code in batch) for batch in batches]
        sizes = ", ".join(f"{batch} on {_ranks_with(batch, described)}" for batch in dict.fromkeys(described))
        raise ValueError(
            f"{name}: all ranks must have batches of the same shape and type, got {sizes}. "
            "Use drop_last=True in the data loader, or a sampler that pads the last batch."
        )


def _batches_of_all_ranks(rows: Sequence[Tensor], group: Group) -> list[list[list[int]]]:
    """Return every rank's tensors: three lengths, -1 for a missing one, and the number of the type, -1 for another."""
    codes = [(*(*x.shape, -1, -1, -1)[:3], _TYPES.index(x.dtype) if x.dtype in _TYPES else -1) for x in rows]
    device = rows[0].device
    if device.type != "cpu" and "cpu:" in dist.get_backend_config(group):
        device = torch.device("cpu")
    gathered: list[list[list[int]]] = start_gather(torch.tensor([codes], device=device), group)().tolist()
    return gathered


def _describe(*code: int) -> str:
    """Return for example "(8, 16) float32"."""
    *shape, number = code
    dtype = str(_TYPES[number]).removeprefix("torch.") if number >= 0 else "of another type"
    return f"{tuple(length for length in shape if length >= 0)} {dtype}"


def _ranks_with(batch: str, batches: Sequence[str]) -> str:
    ranks = [str(rank) for rank, other in enumerate(batches) if other == batch]
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:_NAMED])}{more}"
