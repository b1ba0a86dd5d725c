"""Where DeepSpeed's ZeRO keeps which part of which parameter, told to the optimizers that take norms of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .config import ConfigError
from .layerwise import LayerwiseOptimizer, Layout, Piece


def shard_norms(zero: Any, stage: int) -> None:
    """Let LARS or LAMB, wrapped in DeepSpeed's optimizer ``zero`` of this stage, sum its norms over the ranks.

    Other optimizers work element by element and need nothing, nor does any at stage 0, which shards nothing. ZeRO
    steps its flat shards one after another, so a training step makes one reduction for every shard with weight
    decay: two with fasttrain's groups (and more only at stage 3 with shards above ``sub_group_size``, 1e9 elements).
    Collective. Raises ConfigError if this version of DeepSpeed shards in a way that is not known here.
    """
    optimizer = getattr(zero, "optimizer", None)
    if stage == 0 or not isinstance(optimizer, LayerwiseOptimizer):
        return
    group = zero.dp_process_group

    def sum_over_ranks(tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=group)

    if stage == 3:
        rank = dist.get_rank(group)
        shards = list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        layouts = {
            flat: parameter_by_parameter([(p.ds_numel, p.partition_numel()) for p in parameters], rank)
            for flat, parameters in shards
        }
    else:
        shards = list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))
        layouts = {flat: _mapped(parameters) for flat, parameters in shards}
    expected = [_elements(parameter) for _, parameters in shards for parameter in parameters]
    held = torch.tensor([piece.numel for layout in layouts.values() for piece in layout], device=shards[0][0].device)
    sum_over_ranks(held)
    if held.tolist() != expected:
        raise ConfigError(
            f"--zero_stage {stage} of this DeepSpeed shards parameters in a way that LARS and LAMB do not know; "
            "use --zero_stage 0 or another DeepSpeed"
        )
    optimizer.shard(layouts, sum_over_ranks)


def parameter_by_parameter(sizes: Sequence[tuple[int, int]], rank: int) -> Layout:
    """ZeRO-3's layout from each parameter's elements and its elements a rank, the last of which are padding.

    A shard is the concatenation of every parameter's part for this rank, padding included.
    """
    pieces, start = [], 0
    for numel, part in sizes:
        pieces.append(Piece(start, min(max(numel - rank * part, 0), part)))
        start += part
    return pieces


def _mapped(parameters: Iterable[Any]) -> Layout:
    """The layout of ZeRO-1 and 2, which cut all parameters of a group, end to end, into one shard a rank.

    DeepSpeed has noted on each where its part lies, if the rank holds one.
    """
    found = [parameter._hp_mapping for parameter in parameters]
    addresses = [mapping and mapping.get_hp_fragment_address() for mapping in found]
    return [Piece(a.start, a.numel) if a else Piece(0, 0) for a in addresses]


def _elements(parameter: Any) -> int:
    """Elements of the whole parameter, which ZeRO-3 keeps beside it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
