"""The teacher: an exponential moving average of the student that receives no gradient."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..distributed.deepspeed_names import full_numel, local_shard

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """Return a frozen copy of the student without stochastic depth.

    The teacher has its own BatchNorm statistics, as in BYOL and DINO, and so stays in training mode.
    """
    # timm's import takes seconds, which an invalid flag and --help should not wait for
    from .drop_path import remove_stochastic_depth

    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    remove_stochastic_depth(teacher)
    return teacher


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Update ``teacher <- momentum teacher + (1 - momentum) student``, parameter by parameter, in fp32.

    The parameters are fp32 at every precision of the run, because autocast lowers only the products. A bf16 average
    would not move at all at momentum 0.996. Under ZeRO-3 each rank averages its own shards of both networks, which have
    the same layout, so nothing is communicated. The student may have further parameters.
    """
    trained = dict(student.named_parameters())
    pairs = [(parameter, trained[name]) for name, parameter in teacher.named_parameters()]
    tensors = [(t, s) for pair in pairs for t, s in zip(*map(_local_tensors, pair), strict=True)]
    torch._foreach_lerp_([t for t, _ in tensors], [s for _, s in tensors], 1 - momentum)


def _local_tensors(parameter: nn.Parameter) -> list[Tensor]:
    """Return this rank's tensors of a parameter: the whole, or its ZeRO-3 shard.

    ZeRO-3 also stores small parameters whole and does not read their shard again, so both must be updated.
    """
    shard = local_shard(parameter)
    if shard is None:
        return [parameter.data]
    whole = parameter.data.numel() == full_numel(parameter)
    return [shard.data, parameter.data] if whole else [shard.data]
