"""How the optimizer treats every parameter: the method's rule, and the flags for a backbone with given weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..config.settings import TrainConfig
from ..errors import ConfigError
from ..methods import Method
from ..models.depth import depths
from ..optim.optimizers import ParameterRule

_BACKBONE = "student.backbone."
_PATCHES = "patch_embed"


def parameter_rules(method: Method, train: TrainConfig) -> Callable[[str, nn.Parameter], ParameterRule]:
    """Return the function from a parameter's name and value to its rule.

    A backbone's parameter with n layers between it and the output learns at ``layer_decay ** n`` of the method's rate.
    Its patch embedding learns at ``patch_embed_lr_mult`` of that (arXiv 2304.07193, table 16), and all of it is frozen
    for ``freeze_backbone_epochs``. Raise ConfigError for a flag that the network has no use for.
    """
    rule_for: Callable[[str, nn.Parameter], ParameterRule] = partial(method.parameter_rule, decay_all=train.decay_all)
    decays, slow_patches = train.layer_decay != 1, train.patch_embed_lr_mult != 1
    if not (decays or slow_patches or train.freeze_backbone_epochs):
        return rule_for
    backbone: Any = method.student.backbone
    names = [name for name, _ in backbone.named_parameters()]
    try:
        depth = depths(backbone) if decays else dict.fromkeys(names, 0)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if slow_patches and not any(_PATCHES in name.split(".") for name in names):
        raise ConfigError(f"--patch_embed_lr_mult: {type(backbone).__name__} has no patches. Leave it out.")

    def scaled(name: str, parameter: nn.Parameter) -> ParameterRule:
        rule = rule_for(name, parameter)
        if not name.startswith(_BACKBONE):
            return rule
        own = name.removeprefix(_BACKBONE)
        scale, place = train.layer_decay ** depth[own], f" {depth[own]} layers below the output" if decays else ""
        if slow_patches and _PATCHES in own.split("."):
            scale, place = scale * train.patch_embed_lr_mult, " of the patch embedding"
        return replace(
            rule,
            group=f"the backbone's {rule.group}{place}",
            lr_scale=rule.lr_scale * scale,
            frozen_epochs=max(rule.frozen_epochs, train.freeze_backbone_epochs),
        )

    return scaled
