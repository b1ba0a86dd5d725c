"""What the photometric pass is given: of each image, a colour matrix, a blur, whether solarised, whether flipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..color import YIQ, ColorSpace, normalisation
from ..views import Parameters, View, ViewRecipe

MIDDLE = 128.0
"""Contrast is about the middle of the range, not the image's mean as in torchvision: so it needs no pass of its own."""


@dataclass(frozen=True)
class Draws:
    """What happens to the B images of a view, in this order: matrix, blur, solarisation; the flip commutes with all."""

    matrix: NDArray[np.float32] | None  # [B, C, C] of 8-bit values, to the left of a pixel; None where colours stay
    offset: NDArray[np.float32] | None  # [B, C], added to the product
    sigma: NDArray[np.float32]  # [B] of the Gaussian, pixels; 0 where there is no blur
    solarize: NDArray[np.bool_]  # [B] values v become min(v, 255 - v): those from 128 up are inverted
    flip: NDArray[np.bool_]  # [B] left to right

    def of(self, rows: NDArray[Any]) -> Draws:
        """The same of some of the images."""
        matrix = None if self.matrix is None else self.matrix[rows]
        offset = None if self.offset is None else self.offset[rows]
        return Draws(matrix, offset, self.sigma[rows], self.solarize[rows], self.flip[rows])


@dataclass(frozen=True)
class Look:
    """In which colour space and how normalised the pixels come out: a value v of channel c is scale_c v + shift_c."""

    color_space: ColorSpace
    scale: NDArray[np.float32]  # [C]
    shift: NDArray[np.float32]  # [C]

    @classmethod
    def of(cls, recipe: ViewRecipe) -> Look:
        """What a recipe asks for."""
        return cls(recipe.color_space, *normalisation(recipe.color_space, recipe.mean, recipe.std))


def draws(view: View, channels: int, drawn: Parameters, number: int) -> Draws:
    """What is left to do for view ``number``: RandAugment comes after colours and blur, and has them done before."""
    done = view.rand_augment > 0
    colored = not done and (view.grey > 0 or (view.jitter_p > 0 and any(view.jitter)))
    matrix, offset = color_matrix(drawn.color[number], channels) if colored else (None, None)
    sigma = np.zeros_like(drawn.sigma[number]) if done else drawn.sigma[number]
    return Draws(matrix, offset, sigma, drawn.solarize[number], drawn.flip[number])


def color_matrix(color: NDArray[np.float32], channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrix [B, C, C] and offset [B, C] for 8-bit values of ``color`` [B, 4], as ``Parameters`` has it.

        x -> b (c (Y^-1 H S Y x - 128) + 128)

    with brightness b, contrast c, Y from RGB to YIQ, S = diag(1, s, s) and H the turn of I and Q. Saturation 0 is grey,
    Y's first row. One channel has no hue and no saturation.
    """
    brightness, contrast, saturation, hue = color.astype(np.float64).T
    offset = np.repeat((brightness * MIDDLE * (1 - contrast))[:, None], channels, 1)
    gain = (brightness * contrast)[:, None, None]
    if channels == 1:
        return gain.astype(np.float32), offset.astype(np.float32)
    angle = 2 * np.pi * hue
    turned = np.zeros((len(color), 3, 3))
    turned[:, 0, 0] = 1
    turned[:, 1, 1] = turned[:, 2, 2] = saturation * np.cos(angle)
    turned[:, 1, 2], turned[:, 2, 1] = saturation * np.sin(angle), -saturation * np.sin(angle)
    return (gain * (np.linalg.inv(YIQ) @ turned @ YIQ)).astype(np.float32), offset.astype(np.float32)


def radius(sigma: NDArray[np.float32]) -> NDArray[np.int32]:
    """Pixels to either side that a Gaussian takes in: three sigmas, so that narrow ones cost little; 0 for none."""
    return np.ceil(3 * sigma).astype(np.int32)
