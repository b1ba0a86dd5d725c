"""Holds what a format's own reader makes of a file to the network that was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..pretrained import Backbone, Blueprint

_BATCHES = (1, 2, 5)


def random_images(blueprint: Blueprint, batch: int) -> Tensor:
    """Normal images [batch, C, size, size], always the same ones."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, blueprint.pixels.channels, blueprint.size, blueprint.size, generator=generator)


@torch.no_grad()
def check_same(
    backbone: Backbone,
    other: Callable[[Tensor], Tensor],
    reader: str,
    *,
    tolerance: float = 1e-5,
    batches: Sequence[int] = _BATCHES,
) -> float:
    """Largest difference of the features of random images, relative to the largest feature where that is above 1.

    Raises ConfigError where it exceeds ``tolerance``: what was written must not be used.
    """
    worst = 0.0
    for batch in batches:
        images = random_images(backbone.blueprint, batch)
        wanted, found = backbone.network(images), other(images)
        if wanted.shape != found.shape:
            raise ConfigError(
                f"{reader} gives features {[*found.shape]}, not {[*wanted.shape]}; choose another --format"
            )
        apart = float((wanted - found).abs().max() / wanted.abs().max().clamp_min(1))
        if not apart <= tolerance:  # NaN too
            raise ConfigError(f"{reader} gives other features, {apart:.1e} apart; choose another --format")
        worst = max(worst, apart)
    return worst
