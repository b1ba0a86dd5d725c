"""Check an exported file: its format's own reader must give the features of the original network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ..pipelines import sides
from ..pretrained import Backbone, Blueprint

_BATCHES = (1, 2, 5)


def random_images(blueprint: Blueprint, batch: int) -> Tensor:
    """Return images [batch, C, H, W] of normal noise, the same in every call."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, blueprint.pixels.channels, *sides(blueprint.size), generator=generator)


@torch.no_grad()
def check_same(
    backbone: Backbone,
    other: Callable[[Tensor], Tensor],
    reader: str,
    *,
    tolerance: float = 1e-5,
    batches: Sequence[int] = _BATCHES,
) -> float:
    """Return the largest difference of features of random images, relative to the largest feature if that is above 1.

    Raise ConfigError if it exceeds ``tolerance``. The file must then not be used.
    """
    worst = 0.0
    for batch in batches:
        images = random_images(backbone.blueprint, batch)
        expected, features = backbone.network(images), other(images)
        if expected.shape != features.shape:
            raise ConfigError(
                f"--format: {reader} must give features of shape {[*expected.shape]}, got {[*features.shape]}. "
                "Choose another format."
            )
        error = float((expected - features).abs().max() / expected.abs().max().clamp_min(1))
        if not error <= tolerance:  # NaN too
            raise ConfigError(f"--format: {reader} gives features that differ by {error:.1e}. Choose another format.")
        worst = max(worst, error)
    return worst
