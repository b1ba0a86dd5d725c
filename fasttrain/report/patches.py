"""The main directions of a network's patch features, as colours (arXiv 2304.07193, figure 1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import ConfigError
from .neighbours import Shown, choose
from .pictures import data_uri, to_image
from .samples import Sample

IMAGES = 6
_COLOURS = 3
_ENDS = 0.02
"""The part of the patches at each end of a component that has its darkest or brightest colour."""


@torch.no_grad()
def patch_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the features of the last layer at every place, [B, D, rows, columns], without [CLS] and registers.

    Raise ConfigError for a network that does not return them, or has fewer than four places.
    """
    forward: Any = getattr(network, "forward_intermediates", None)
    if forward is None:
        raise ConfigError(f"{type(network).__name__} does not return the features of its patches")
    training = network.training
    network.eval()
    try:
        (features,) = forward(images, indices=1, norm=True, intermediates_only=True, output_fmt="NCHW")
    except Exception as error:  # networks without a last norm, or with other arguments
        raise ConfigError(f"{type(network).__name__} does not return the features of its patches") from error
    finally:
        network.train(training)
    if features[0, 0].numel() < _COLOURS + 1:
        raise ConfigError(f"an image has only {features[0, 0].numel()} patches")
    patches: Tensor = features
    return patches


def components(features: Tensor) -> Tensor:
    """Return the first three principal components of features [B, D, rows, columns], as [B, 3, rows, columns] in 0..1.

    They are of the patches of all images together, so equal colours are alike in all of them. Each component is
    stretched to 0..1, without its outermost 2 % at both ends.
    """
    rows = features.double().movedim(1, -1)
    flat = rows.flatten(0, -2)
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    directions = directions[:_COLOURS]
    # The sign of a direction is arbitrary; this one makes the same picture on every machine.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    scores = flat @ (directions * largest.sign()).T
    least, most = scores.quantile(torch.tensor([_ENDS, 1 - _ENDS], dtype=scores.dtype), dim=0)
    shades = ((scores - least) / (most - least).clamp_min(1e-12)).clamp(0, 1)
    places: Tensor = shades.float().unflatten(0, rows.shape[:-1]).movedim(-1, 1)
    return places


def table(sample: Sample) -> list[list[Shown]]:
    """Return a row per image: the image, and the components of its patches."""
    chosen = choose(sample, IMAGES)
    maps = components(patch_features(sample.backbone.network, sample.inputs(chosen)).cpu())
    rows = []
    for i, picture, colours in zip(chosen, sample.pictures(chosen), maps, strict=True):
        name = sample.describe(i)
        shown = to_image(colours.numpy().astype(np.float32)).resize(picture.size, Image.Resampling.NEAREST)
        rows.append([Shown(data_uri(picture), f"Image: {name}"), Shown(data_uri(shown), f"Patches of {name}")])
    return rows
