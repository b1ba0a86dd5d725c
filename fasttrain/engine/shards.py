"""Layouts of ZeRO's shards for code that needs norms of whole parameters, and gradients by parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from ..optim.layerwise import Layout
from .zero import full_numel, group_gradients, process_group, stepped_tensors


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


def find_shards(optimizer: Any, stage: int) -> Shards | None:
    """Return the shards of DeepSpeed's optimizer, or None at stage 0, which has none.

    ZeRO steps its flat shards one after another, so a sum over ranks runs once per shard. fasttrain's default groups
    give two shards. Stage 3 splits shards above ``sub_group_size``, 1e9 elements. Collective. Raises ConfigError if
    this version of DeepSpeed has an unknown layout.
    """
    if stage == 0:
        return None
    tensors = stepped_tensors(optimizer, stage)
    device = tensors[0][1][0].parameter.device
    layouts = {flat: [piece.piece for piece in pieces] for flat, pieces in tensors}
    shards = Shards(layouts, process_group(optimizer), device)
    expected = [full_numel(piece.parameter) for _, pieces in tensors for piece in pieces]
    sizes = torch.tensor([piece.numel for layout in layouts.values() for piece in layout], device=tensors[0][0].device)
    shards.sum_over_ranks(sizes)
    if sizes.tolist() != expected:
        raise ConfigError(
            f"--zero_stage {stage}: this version of DeepSpeed has an unknown layout of shards, so norms of parameters "
            "cannot be computed. Use --zero_stage 0 or another version of DeepSpeed."
        )
    return shards


def gradients(optimizer: Any, stage: int) -> list[tuple[str, list[Tensor]]]:
    """Return each parameter group's name and this rank's part of its averaged gradient.

    See :func:`fasttrain.engine.zero.group_gradients`.
    """
    names = [group["name"] for group in optimizer.param_groups]
    return list(zip(names, group_gradients(optimizer, stage), strict=True))
