"""Optimizers and their parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .layerwise import Lamb, Lars

NAMES = ("adamw", "sgd", "lars", "lamb")


class Role(str, Enum):
    """What a parameter group is for: matrices, biases and norms, or prototypes, which may be frozen at the start."""

    DECAY = "decay"
    NO_DECAY = "no_decay"
    PROTOTYPES = "prototypes"
    CONSTANT_DECAY = "constant_decay"
    CONSTANT_NO_DECAY = "constant_no_decay"

    @property
    def decays(self) -> bool:
        """Whether the weight decay's schedule is the group's; biases and norms have none."""
        return self not in (Role.NO_DECAY, Role.CONSTANT_NO_DECAY)

    @property
    def constant_lr(self) -> bool:
        """Whether the learning rate stays at its peak (SimSiam's predictor)."""
        return self in (Role.CONSTANT_DECAY, Role.CONSTANT_NO_DECAY)

    @property
    def words(self) -> str:
        """The group in words."""
        return {
            Role.DECAY: "weight matrices",
            Role.NO_DECAY: "biases and norms",
            Role.PROTOTYPES: "prototypes",
            Role.CONSTANT_DECAY: "predictor's weight matrices",
            Role.CONSTANT_NO_DECAY: "predictor's biases and norms",
        }[self]


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    decay_all: bool = False,
    constant_lr: Collection[str] = (),
) -> list[dict[str, Any]]:
    """The trained parameters by :class:`Role`, each group with its ``name`` and its ``weight_decay`` for the schedules.

    ``layerwise`` tells LARS and LAMB whether to scale the group's steps, whatever its weight decay is at the time.
    Biases and one-dimensional tensors get no weight decay unless ``decay_all``; modules named in ``constant_lr`` keep
    the peak learning rate.
    """
    roles: dict[Role, list[nn.Parameter]] = {role: [] for role in Role}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            roles[_role(name.split("."), parameter, decay_all, constant_lr)].append(parameter)
    return [
        {
            "name": role.value,
            "params": parameters,
            "weight_decay": weight_decay if role.decays else 0.0,
            "layerwise": role.decays,
        }
        for role, parameters in roles.items()
        if parameters
    ]


def _role(path: list[str], parameter: nn.Parameter, decay_all: bool, constant_lr: Collection[str]) -> Role:
    if "prototypes" in path:
        return Role.PROTOTYPES
    decays = decay_all or _shape_dims(parameter) > 1
    if not set(path).isdisjoint(constant_lr):
        return Role.CONSTANT_DECAY if decays else Role.CONSTANT_NO_DECAY
    return Role.DECAY if decays else Role.NO_DECAY


def _shape_dims(parameter: nn.Parameter) -> int:
    """Number of dimensions; under ZeRO-3 the parameter itself is empty and its shape is kept beside it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def create_optimizer(
    name: str, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.9, sharded: bool = False
) -> torch.optim.Optimizer:
    """The named optimizer over ``groups``, whose tensors ZeRO will shard if ``sharded``.

    torch's fused AdamW and SGD work on shards as they do on parameters; no peer's is faster. apex's LAMB, where it is
    installed, takes parameters whole and on a GPU only. Raises ValueError for a name that is not in ``NAMES``.
    """
    groups = list(groups)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    if name == "lars":
        return Lars(groups, lr=lr, momentum=momentum)
    if name == "lamb":
        on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
        # Where weight decay is 0 apex scales no step, ours those of a ``layerwise`` group.
        alike = all(group["weight_decay"] != 0 for group in groups if group.get("layerwise"))
        fused = apex_lamb() if on_gpu and alike and not sharded else None
        # Gradients are clipped before, by DeepSpeed; 0 would not mean "never" to apex, it would divide by it.
        return fused(groups, lr=lr, max_grad_norm=math.inf) if fused else Lamb(groups, lr=lr)
    raise ValueError(f"optimizer {name!r} is unknown; choose one of {', '.join(NAMES)}")


def apex_lamb() -> Callable[..., torch.optim.Optimizer] | None:
    """``FusedLAMB`` of NVIDIA's apex; None without it or its CUDA extensions, or with PyPI's apex, another project."""
    try:
        if not hasattr(import_module("apex"), "optimizers"):
            return None
        if not import_module("apex.multi_tensor_apply").multi_tensor_applier.available:
            return None
        made: Callable[..., torch.optim.Optimizer] = import_module("apex.optimizers").FusedLAMB
        return made
    except Exception:  # PyPI's apex, and a build for another torch, fail as they please
        return None


def in_use() -> str:
    """One line: whose optimizers are used."""
    lamb = "lamb: fasttrain's"
    if torch.cuda.is_available() and apex_lamb():
        lamb = "lamb: apex's FusedLAMB at --zero_stage 0, fasttrain's above"
    return f"adamw, sgd: torch's fused; lars: fasttrain's; {lamb}"
