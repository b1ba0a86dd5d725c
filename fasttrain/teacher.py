"""The teacher: an exponential moving average of the student that receives no gradient."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """A copy of the student, frozen. It keeps BatchNorm statistics of its own, as BYOL's and DINO's do."""
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    return teacher


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``teacher <- momentum teacher + (1 - momentum) student``, parameter by parameter, in fp32.

    The parameters stay fp32 whatever the precision of the run (autocast lowers the products only): an average kept in
    bf16 would not move at all at momentum 0.996. Under ZeRO-3 each rank averages the shards that it holds of both,
    which are cut alike, so nothing is gathered or sent.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    averages = [_local(t) for t, _ in pairs]
    torch._foreach_lerp_(averages, [_local(s) for _, s in pairs], 1 - momentum)


def _local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: all of it, or its ZeRO-3 shard."""
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard.data
