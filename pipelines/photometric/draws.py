"""What the photometric pass is given: of each image, a colour matrix, a blur, whether solarised, whether flipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..color import YIQ, ColorSpace, normalisation
from ..views import Parameters, View, ViewRecipe


@dataclass(frozen=True)
class Draws:
    """What happens to the B images of a view, in this order: matrix, blur, solarisation; the flip commutes with all."""

    matrix: NDArray[np.float32] | None  # [B, C, C] of 8-bit values, to the left of a pixel; None where colours stay
    mean_share: NDArray[np.float32] | None  # [B] share of the view's mean grey that is added to the product
    sigma: NDArray[np.float32]  # [B] of the Gaussian, pixels; 0 where there is no blur
    solarize: NDArray[np.bool_]  # [B] values v become min(v, 255 - v): those from 128 up are inverted
    flip: NDArray[np.bool_]  # [B] left to right

    def of(self, rows: NDArray[Any]) -> Draws:
        """The same of some of the images."""
        matrix = None if self.matrix is None else self.matrix[rows]
        share = None if self.mean_share is None else self.mean_share[rows]
        return Draws(matrix, share, self.sigma[rows], self.solarize[rows], self.flip[rows])


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
    matrix, share = color_matrix(drawn.color[number], channels) if colored else (None, None)
    sigma = np.zeros_like(drawn.sigma[number]) if done else drawn.sigma[number]
    return Draws(matrix, share, sigma, drawn.solarize[number], drawn.flip[number])


def color_matrix(color: NDArray[np.float32], channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrix [B, C, C] and share of the mean [B] for 8-bit values, of ``color`` [B, 4] as ``Parameters`` has it.

        x -> b (c (Y^-1 H S Y x - m) + m) = matrix x + share m,  m = mean of the view's luma

    with brightness b, contrast c, Y from RGB to YIQ, S = diag(1, s, s) and H the turn of I and Q. Saturation 0 is grey,
    Y's first row. One channel has no hue and no saturation. H and S keep luma, and b scales m with x: so any order of
    the four is this one, but for values that torchvision cuts off in between.
    """
    brightness, contrast, saturation, hue = color.astype(np.float64).T
    share = (brightness * (1 - contrast)).astype(np.float32)
    gain = (brightness * contrast)[:, None, None]
    if channels == 1:
        return gain.astype(np.float32), share
    angle = 2 * np.pi * hue
    turned = np.zeros((len(color), 3, 3))
    turned[:, 0, 0] = 1
    turned[:, 1, 1] = turned[:, 2, 2] = saturation * np.cos(angle)
    turned[:, 1, 2], turned[:, 2, 1] = saturation * np.sin(angle), -saturation * np.sin(angle)
    return (gain * (np.linalg.inv(YIQ) @ turned @ YIQ)).astype(np.float32), share


def radius(sigma: NDArray[np.float32]) -> NDArray[np.int32]:
    """Pixels to either side that a Gaussian takes in: three sigmas, so that narrow ones cost little; 0 for none."""
    return np.ceil(3 * sigma).astype(np.int32)
