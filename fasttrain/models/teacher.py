"""The teacher: an exponential moving average of the student that receives no gradient."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..distributed.deepspeed_names import full_numel, local_shard

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """A copy of the student, frozen, that drops no paths: stochastic depth is the student's alone.

    It keeps BatchNorm statistics of its own, as BYOL's and DINO's do, and so stays in training mode.
    """
    from timm.layers import DropPath  # takes seconds, for which a wrong flag or --help should not wait

    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    for layer in teacher.modules():
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``teacher <- momentum teacher + (1 - momentum) student``, parameter by parameter, in fp32.

    The parameters stay fp32 whatever the precision of the run (autocast lowers the products only): an average kept in
    bf16 would not move at all at momentum 0.996. Under ZeRO-3 each rank averages the shards that it holds of both,
    which are cut alike, so nothing is gathered or sent.
    """
    pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
    held = [(t, s) for pair in pairs for t, s in zip(*map(_held, pair), strict=True)]
    torch._foreach_lerp_([t for t, _ in held], [s for _, s in held], 1 - momentum)


def _held(parameter: nn.Parameter) -> list[Tensor]:
    """What this rank holds of a parameter: all of it; or its ZeRO-3 shard, and all of it too if it is a small one.

    ZeRO-3 keeps small parameters whole beside their shards and does not read the shard again, so both must move.
    """
    shard = local_shard(parameter)
    if shard is None:
        return [parameter.data]
    whole = parameter.data.numel() == full_numel(parameter)
    return [shard.data, parameter.data] if whole else [shard.data]
