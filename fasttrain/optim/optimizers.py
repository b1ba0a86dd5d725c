"""Optimizers and their parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .layerwise import Lamb, Lars

NAMES = ("adamw", "sgd", "lars", "lamb")

_MATRICES, _BIASES, _PROTOTYPES = "weight matrices", "biases and norms", "prototypes"
_ORDER = (_MATRICES, _BIASES, _PROTOTYPES)
"""The groups that come first. ZeRO's flat shards, and so older checkpoints, depend on the order of the groups."""


@dataclass(frozen=True)
class ParameterRule:
    """How the optimizer treats a parameter. Parameters with equal rules form one parameter group.

    A method returns one rule per parameter name from ``Method.parameter_rule``. Layer-wise learning-rate decay, for
    example, is an ``lr_scale`` that depends on the block's number in the name. :func:`set_schedules` applies a rule.

    Raises ValueError for a negative scale.
    """

    group: str = _MATRICES
    """The group's name in messages, such as "the gradient of the biases and norms is not finite"."""
    lr_scale: float = 1.0
    """Factor of the learning rate."""
    weight_decay_scale: float = 1.0
    """Factor of the weight decay."""
    frozen_epochs: float = 0.0
    """The parameter does not move before this epoch."""
    constant_lr: bool = False
    """Whether the learning rate stays at its peak, as for SimSiam's predictor."""
    layerwise: bool = True
    """Whether LARS and LAMB scale the step by the trust ratio. They use this flag, not the current weight decay."""

    def __post_init__(self) -> None:
        for name in ("lr_scale", "weight_decay_scale"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} of the {self.group}: must be at least 0, got {getattr(self, name)}.")


def default_rule(
    name: str,
    parameter: nn.Parameter,
    *,
    decay_all: bool = False,
    constant_lr: Collection[str] = (),
    frozen_prototype_epochs: float = 0.0,
) -> ParameterRule:
    """Return the rule of a parameter in the published recipes.

    Biases and one-dimensional tensors have no weight decay and no trust ratio unless ``decay_all``. Prototypes always
    have both, and are frozen for ``frozen_prototype_epochs``. Modules named in ``constant_lr`` keep the peak learning
    rate.
    """
    path = name.split(".")
    if "prototypes" in path:
        return ParameterRule(_PROTOTYPES, frozen_epochs=frozen_prototype_epochs)
    rule = ParameterRule()
    if parameter.dim() <= 1 and not decay_all:
        rule = ParameterRule(_BIASES, weight_decay_scale=0.0, layerwise=False)
    module = next((part for part in path if part in constant_lr), None)
    return rule if module is None else replace(rule, group=f"{module}'s {rule.group}", constant_lr=True)


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    rule_for: Callable[[str, nn.Parameter], ParameterRule] = default_rule,
) -> list[dict[str, Any]]:
    """Return the trained parameters as an optimizer's groups, one group per distinct rule.

    A group has its ``name``, ``params``, ``weight_decay`` and the fields of its rule as plain values, which a
    checkpoint can hold. The three default groups come first; others follow in the order of their first parameter.
    """
    members: dict[ParameterRule, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            members.setdefault(rule_for(name, parameter), []).append(parameter)

    def position(rule: ParameterRule) -> int:
        return _ORDER.index(rule.group) if rule.group in _ORDER else len(_ORDER)

    return [
        {
            "name": rule.group,
            "params": members[rule],
            "weight_decay": weight_decay * rule.weight_decay_scale,
            "lr_scale": rule.lr_scale,
            "weight_decay_scale": rule.weight_decay_scale,
            "frozen_epochs": rule.frozen_epochs,
            "constant_lr": rule.constant_lr,
            "layerwise": rule.layerwise,
        }
        for rule in sorted(members, key=position)
    ]


def set_schedules(group: dict[str, Any], *, lr: float, peak_lr: float, weight_decay: float, epoch: float) -> None:
    """Set a group's learning rate and weight decay from the schedules' values at ``epoch``, by the group's rule.

    A learning rate of 0 freezes parameters at every ZeRO stage. Clearing ``.grad``, as DINO's code does, would not.
    """
    frozen = epoch < group["frozen_epochs"]
    group["lr"] = 0.0 if frozen else group["lr_scale"] * (peak_lr if group["constant_lr"] else lr)
    group["weight_decay"] = group["weight_decay_scale"] * weight_decay


def create_optimizer(
    name: str, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.9, sharded: bool = False
) -> torch.optim.Optimizer:
    """Return the named optimizer over ``groups``. ``sharded`` says that ZeRO will shard their tensors.

    torch's fused AdamW and SGD work on shards as well as on parameters, and no other library's are faster. apex's LAMB
    works on whole parameters on a GPU only; it is used where it is installed. Raises ValueError for a name that is not
    in ``NAMES``.
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
        # apex scales no step where the weight decay is 0. Ours follows the group's ``layerwise``.
        same_steps = all(group["weight_decay"] != 0 for group in groups if group.get("layerwise"))
        fused = apex_lamb() if on_gpu and same_steps and not sharded else None
        # DeepSpeed has clipped the gradients. A limit of 0 would not switch apex's clipping off: apex divides by it.
        return fused(groups, lr=lr, max_grad_norm=math.inf) if fused else Lamb(groups, lr=lr)
    raise ValueError(f"--optimizer: {name!r} is unknown. Choose one of {', '.join(NAMES)}.")


def apex_lamb() -> Callable[..., torch.optim.Optimizer] | None:
    """Return ``FusedLAMB`` of NVIDIA's apex, or None.

    None means no apex, an apex without CUDA extensions, or PyPI's apex, which is another project.
    """
    try:
        if not hasattr(import_module("apex"), "optimizers"):
            return None
        if not import_module("apex.multi_tensor_apply").multi_tensor_applier.available:
            return None
        fused_lamb: Callable[..., torch.optim.Optimizer] = import_module("apex.optimizers").FusedLAMB
        return fused_lamb
    except Exception:  # PyPI's apex, and an apex built for another torch, raise all kinds of errors
        return None


def in_use() -> str:
    """Return one line that names the implementation of every optimizer."""
    lamb = "lamb: fasttrain's"
    if torch.cuda.is_available() and apex_lamb():
        lamb = "lamb: apex's FusedLAMB at --zero_stage 0, fasttrain's above"
    return f"adamw, sgd: torch's fused; lars: fasttrain's; {lamb}"
