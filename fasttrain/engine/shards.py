"""Where DeepSpeed's ZeRO keeps which part of which parameter, for whatever takes norms of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from ..optim.layerwise import Layout, Piece
from ..optim.optimizers import Role


@dataclass(frozen=True)
class Shards:
    """Which pieces of which parameters the flat shards hold that DeepSpeed's inner optimizer steps."""

    layouts: Mapping[Tensor, Layout]
    group: Any
    device: torch.device
    """Where the ranks' backend reduces; shards of an offloaded optimizer lie elsewhere."""

    def sum_over_ranks(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks that share the parameters."""
        total = tensor.to(self.device)
        dist.all_reduce(total, group=self.group)
        tensor.copy_(total)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that DeepSpeed's wraps, or that it is."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


class Share(NamedTuple):
    """A rank's part of a parameter: elements from ``offset`` of it, flattened, lie in ``piece`` of the flat shard."""

    parameter: Any
    offset: int
    piece: Piece


def shares(optimizer: Any, stage: int) -> list[tuple[Tensor, list[Share]]]:
    """For every tensor that the inner optimizer steps, whose elements it holds; at stage 0 a parameter's own."""
    if stage == 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return [(p, [Share(p, 0, Piece(0, p.numel()))]) for p in parameters]
    if stage < 3:
        held = zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True)
        return [(flat, [_mapped(p) for p in parameters]) for flat, parameters in held]
    rank = optimizer.dp_process_group.rank()
    found = []
    for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        pieces = parameter_by_parameter([(p.ds_numel, p.partition_numel()) for p in parameters], rank)
        offsets = [rank * p.partition_numel() for p in parameters]
        found.append((flat, [Share(*share) for share in zip(parameters, offsets, pieces, strict=True)]))
    return found


def share_weights(optimizer: Any, stage: int) -> None:
    """Let stage 3 step a rank's shards of the weights themselves, not copies of them: all are fp32.

    DeepSpeed 0.19.8 means to, but compares a torch.device with the name of one, and so copies. What is offloaded lies
    elsewhere and has to be a copy.
    """
    if stage < 3:
        return
    for held, stepped in zip(
        optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
    ):
        if (held.dtype, held.device) == (stepped.dtype, stepped.device) and not optimizer.offload_optimizer:
            stepped.data = held.data


def find_shards(zero: Any, stage: int) -> Shards | None:
    """The shards of DeepSpeed's optimizer ``zero``; None at stage 0, which shards nothing.

    ZeRO steps its flat shards one after another, so what is summed over ranks is so once a shard: two with
    fasttrain's groups (and more only at stage 3 with shards above ``sub_group_size``, 1e9 elements). Collective.
    Raises ConfigError if this version of DeepSpeed shards in a way that is not known here.
    """
    if stage == 0:
        return None
    held = shares(zero, stage)
    device = held[0][1][0].parameter.device
    shards = Shards({flat: [share.piece for share in parts] for flat, parts in held}, zero.dp_process_group, device)
    expected = [_elements(share.parameter) for _, parts in held for share in parts]
    found = torch.tensor([share.piece.numel for _, parts in held for share in parts], device=held[0][0].device)
    shards.sum_over_ranks(found)
    if found.tolist() != expected:
        raise ConfigError(
            f"--zero_stage {stage} of this DeepSpeed shards parameters in a way that norms of parameters do not know; "
            "use --zero_stage 0 or another DeepSpeed"
        )
    return shards


def gradients(optimizer: Any, stage: int) -> list[tuple[Role, list[Tensor]]]:
    """What this rank holds of each group's averaged gradient, once backward is through and before DeepSpeed's step.

    At stage 0 that is all of it, on every rank; above, the ranks' parts make up the whole, and padding is 0.
    """
    roles = [Role(group["name"]) for group in optimizer.param_groups]
    if stage == 0:
        held = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        return list(zip(roles, held, strict=True))
    held = [[] for _ in roles]
    for number, parts in _averaged(optimizer, stage).items():
        group = optimizer.sub_group_to_group_id[number] if stage == 3 else number
        held[group] += [part for part in parts if part is not None]
    return list(zip(roles, held, strict=True))


def _averaged(optimizer: Any, stage: int) -> dict[int, list[Tensor | None]]:
    """The averaged gradients that DeepSpeed's optimizer is about to step with, by the number of their flat shard.

    It hands them to its inner optimizer at the step, but puts an offloaded optimizer's into host memory at once.
    """
    offloaded = optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload
    if not offloaded:
        kept: dict[int, list[Tensor | None]] = optimizer.averaged_gradients
        return kept
    flats = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    return {number: [flat.grad] for number, flat in enumerate(flats)}


@contextmanager
def held_back(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let DeepSpeed make its step, counters and clearing of gradients included, without moving a weight."""
    optimizer.step = lambda *_, **__: None  # type: ignore[assignment]
    try:
        yield
    finally:
        del optimizer.step


def parameter_by_parameter(sizes: Sequence[tuple[int, int]], rank: int) -> Layout:
    """ZeRO-3's layout from each parameter's elements and its elements a rank, the last of which are padding.

    A shard is the concatenation of every parameter's part for this rank, padding included.
    """
    pieces, start = [], 0
    for numel, part in sizes:
        pieces.append(Piece(start, min(max(numel - rank * part, 0), part)))
        start += part
    return pieces


def _mapped(parameter: Any) -> Share:
    """A share under ZeRO-1 and 2, which cut all parameters of a group, end to end, into one shard a rank.

    DeepSpeed has noted on each parameter where its part lies, if the rank holds one.
    """
    mapping = parameter._hp_mapping
    if not mapping:
        return Share(parameter, 0, Piece(0, 0))
    address = mapping.get_hp_fragment_address()
    return Share(parameter, mapping.lp_fragment_address.start, Piece(address.start, address.numel))


def _elements(parameter: Any) -> int:
    """Elements of the whole parameter, which ZeRO-3 keeps beside it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
