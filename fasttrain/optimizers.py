"""Optimizers and their parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

NAMES = ("adamw", "sgd", "lars", "lamb")
PER_LAYER_NORMS = ("lars", "lamb")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups by role: ``decay`` (matrices), ``no_decay`` (biases and norms), ``prototypes`` (frozen at the start).

    Each group carries ``name`` and, for the schedules, its ``weight_decay``: 0 for biases and one-dimensional tensors.
    """
    roles: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "prototypes": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if "prototypes" in name.split("."):
            roles["prototypes"].append(parameter)
        else:
            roles["decay" if _shape_dims(parameter) > 1 else "no_decay"].append(parameter)
    return [
        {"name": role, "params": parameters, "weight_decay": 0.0 if role == "no_decay" else weight_decay}
        for role, parameters in roles.items()
        if parameters
    ]


def _shape_dims(parameter: nn.Parameter) -> int:
    """Number of dimensions; under ZeRO-3 the parameter itself is empty and its shape is kept beside it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def create_optimizer(
    name: str, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """The named optimizer over ``groups``. Raises ValueError for a name that is not in ``NAMES``."""
    groups = list(groups)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    if name in PER_LAYER_NORMS:
        from timm.optim import Lamb, Lars

        # timm's LARS follows the official code where weight decay is 0: no trust ratio for biases and norms.
        made: torch.optim.Optimizer
        made = Lars(groups, lr=lr, momentum=momentum) if name == "lars" else Lamb(groups, lr=lr)
        return made
    raise ValueError(f"optimizer {name!r} is unknown; choose one of {', '.join(NAMES)}")
