"""Layouts of ZeRO's shards for code that needs norms of whole parameters, and gradients by parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from ..optim.layerwise import Layout
from .zero import TESTED, check_names, full_numel, group_gradients, is_copied, process_group, stepped_tensors


@dataclass(frozen=True)
class Shards:
    """The layouts of the flat shards that DeepSpeed's inner optimizer steps."""

    layouts: Mapping[Tensor, Layout]
    group: Any
    device: torch.device
    """The device on which the ranks' backend reduces. Shards of an offloaded optimizer are on another one."""

    def sum_over_ranks(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks that share the parameters."""
        total = tensor.to(self.device)
        dist.all_reduce(total, group=self.group)
        tensor.copy_(total)


def find_shards(optimizer: Any, stage: int, names: Mapping[Tensor, str]) -> Shards | None:
    """Return the shards of DeepSpeed's optimizer before its first step, or None at stage 0, which has none.

    ZeRO steps its flat shards one after another, so a sum over ranks runs once per shard. fasttrain's default groups
    give two shards. Stage 3 splits shards above ``sub_group_size``, 1e9 elements. Collective. Raises ConfigError on
    every rank if this version of DeepSpeed has an unknown layout: the ranks' pieces of a parameter must add up to its
    number of elements and have its values. ``names`` are the parameters' names, for this message.
    """
    if stage == 0:
        return None
    check_names(optimizer, stage)
    tensors = stepped_tensors(optimizer, stage)
    pieces = [(flat, piece) for flat, parts in tensors for piece in parts]
    layouts = {flat: [piece.piece for piece in parts] for flat, parts in tensors}
    shards = Shards(layouts, process_group(optimizer), pieces[0][1].parameter.device)
    counts = torch.tensor([[part.piece.numel, not is_copied(flat, part, stage)] for flat, part in pieces])
    shards.sum_over_ranks(counts)
    for (_, part), (numel, wrong) in zip(pieces, counts.tolist(), strict=True):
        name, expected = names[part.parameter], full_numel(part.parameter)
        if numel != expected or wrong:
            problem = f"{numel:,} of {expected:,} elements" if numel != expected else "other values"
            raise ConfigError(
                f"--zero_stage {stage}: deepspeed {version('deepspeed')} has an unknown layout of shards: the "
                f"shards of {name} have {problem}. Install deepspeed=={TESTED}, or use --zero_stage 0."
            )
    return shards


def gradients(optimizer: Any, stage: int) -> list[tuple[str, list[Tensor]]]:
    """Return each parameter group's name and this rank's part of its averaged gradient.

    See :func:`fasttrain.engine.zero.group_gradients`.
    """
    names = [group["name"] for group in optimizer.param_groups]
    return list(zip(names, group_gradients(optimizer, stage), strict=True))
