"""What the photometric pass is given: of each image, hue, a colour matrix, a blur, whether solarised and flipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..views.color import ColorSpace, luma, normalisation
from ..views.draw import Parameters
from ..views.recipe import View, ViewRecipe


@dataclass(frozen=True)
class Draws:
    """What happens to the B images of a view, in this order; the flip commutes with all. ``turn`` says what hue is."""

    hue: NDArray[np.float32]  # [B] turns; 0 where it stays
    matrix: NDArray[np.float32] | None  # [B, C, C] of 8-bit values, to the left of a pixel; None where colours stay
    mean_share: NDArray[np.float32] | None  # [B] share of the view's mean grey that is added to the product
    sigma: NDArray[np.float32]  # [B] of the Gaussian, pixels; 0 where there is no blur
    solarize: NDArray[np.bool_]  # [B] values v become min(v, 255 - v): those from 128 up are inverted
    flip: NDArray[np.bool_]  # [B] left to right

    def of(self, rows: NDArray[Any]) -> Draws:
        """The same of some of the images."""
        matrix = None if self.matrix is None else self.matrix[rows]
        share = None if self.mean_share is None else self.mean_share[rows]
        return Draws(self.hue[rows], matrix, share, self.sigma[rows], self.solarize[rows], self.flip[rows])


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
    here = colored(view) and not done
    color = drawn.color[number]
    matrix, share = color_matrix(color, channels) if here else (None, None)
    hue = color[:, 3] if here and channels == 3 else np.zeros(len(color), np.float32)
    sigma = np.zeros_like(drawn.sigma[number]) if done else drawn.sigma[number]
    return Draws(hue, matrix, share, sigma, drawn.solarize[number], drawn.flip[number])


def colored(view: View) -> bool:
    """Whether a view's colours may change."""
    return view.grey > 0 or (view.jitter_p > 0 and any(view.jitter))


def color_matrix(color: NDArray[np.float32], channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Matrix [B, C, C] and share of the mean [B] for 8-bit values, of ``color`` [B, 4] as ``Parameters`` has it.

        x -> b (c (s x + (1 - s) l(x) - m) + m) = matrix x + share m

    with brightness b, contrast c, saturation s, luma l and m its mean over the view. Saturation 0 is grey; one channel
    has none. Saturation keeps luma, and b scales m with x: so any order of the three is this one, but for values that
    torchvision cuts off in between.
    """
    brightness, contrast, saturation, _ = color.astype(np.float64).T[:, :, None, None]
    grey = np.tile(luma(channels), (channels, 1))
    matrix = brightness * contrast * (saturation * np.eye(channels) + (1 - saturation) * grey)
    return matrix.astype(np.float32), (brightness * (1 - contrast)).astype(np.float32)[:, 0, 0]


def radius(sigma: NDArray[np.float32]) -> NDArray[np.int32]:
    """Pixels to either side that a Gaussian takes in: three sigmas, so that narrow ones cost little; 0 for none."""
    return np.ceil(3 * sigma).astype(np.int32)
