"""Images of a data set as pictures for people: in RGB, as PIL images, and as data that a page carries in itself."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..pipelines import ViewRecipe

_SIDE = 96  # pixels of a thumbnail at most
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""Dark to bright, evenly in lightness, so that it reads the same without colours."""


def in_rgb(recipe: ViewRecipe) -> ViewRecipe:
    """The same views, which depend on no colour space, as pixel values from 0 to 1."""
    zeros, ones = (0.0,) * recipe.channels, (1.0,) * recipe.channels
    return ViewRecipe(recipe.views, mean=zeros, std=ones, color_space="rgb", pixels=recipe.pixels)


def to_image(view: NDArray[np.float32]) -> Image.Image:
    """The picture of a view [C, H, W] of values in 0..1, one channel or three."""
    pixels = np.rint(view.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def heat(values: NDArray[np.float32]) -> Image.Image:
    """A picture of values [H, W] >= 0, a pixel each: from black at 0 to bright yellow at the greatest."""
    shade = values / max(float(values.max()), 1e-12)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(shade, stops, channel) for channel in np.array(_HEAT).T]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def data_uri(picture: Image.Image) -> str:
    """The picture as ``data:image/webp;base64,...``, 96 pixels wide at most; small ones without loss."""
    small = picture.width <= _SIDE
    if not small:
        picture = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=small and picture.width <= _SIDE // 2, quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
