"""Pictures of a data set's images: in RGB, as PIL images and as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..pipelines import ViewRecipe

_SIDE = 96  # largest side of a thumbnail in pixels
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Colours of linearly increasing lightness, so that the map is readable without colours."""


def in_rgb(recipe: ViewRecipe) -> ViewRecipe:
    """Return the recipe with pixels from 0 to 1 in RGB. The views do not depend on the colour space."""
    zeros, ones = (0.0,) * recipe.channels, (1.0,) * recipe.channels
    return ViewRecipe(recipe.views, mean=zeros, std=ones, color_space="rgb", pixels=recipe.pixels)


def to_image(view: NDArray[np.float32]) -> Image.Image:
    """Return the picture of a view [C, H, W] of values in 0..1.

    Without RGB, it is in grey: the only channel, or the mean of all channels.
    """
    if len(view) not in (1, 3):
        view = view.mean(0, keepdims=True)
    pixels = np.rint(view.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def heat(values: NDArray[np.float32]) -> Image.Image:
    """Return a picture of values [H, W] >= 0, from black at 0 to bright yellow at the maximum."""
    shade = values / max(float(values.max()), 1e-12)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(shade, stops, channel) for channel in np.array(_HEAT).T]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def data_uri(picture: Image.Image) -> str:
    """Return the picture as ``data:image/webp;base64,...``, at most 96 pixels a side; small pictures are lossless."""
    small = max(picture.size) <= _SIDE
    if not small:
        longer = max(picture.size)
        picture = picture.resize([round(side * _SIDE / longer) for side in picture.size], Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=small and picture.width <= _SIDE // 2, quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
