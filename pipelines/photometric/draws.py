"""The inputs of the photometric pass, per image: hue, colour matrix, blur, solarisation and flip."""

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
    """The steps for the B images of a view, in order. The flip commutes with the others. Hue: ``reference.turn``."""

    hue: NDArray[np.float32]  # [B] turns; 0 for no change
    matrix: NDArray[np.float32] | None  # [B, C, C] maps 8-bit pixels, as matrix @ pixel; [B, 1, 1] without RGB
    mean_share: NDArray[np.float32] | None  # [B] fraction of the view's mean grey that is added to the product
    sigma: NDArray[np.float32]  # [B] of the Gaussian, pixels; 0 for no blur
    solarize: NDArray[np.bool_]  # [B] value v becomes min(v, 255 - v): values from 128 up are inverted
    flip: NDArray[np.bool_]  # [B] left to right

    def of(self, rows: NDArray[Any]) -> Draws:
        """Return the steps for some of the images."""
        matrix = None if self.matrix is None else self.matrix[rows]
        share = None if self.mean_share is None else self.mean_share[rows]
        return Draws(self.hue[rows], matrix, share, self.sigma[rows], self.solarize[rows], self.flip[rows])

    def per_channel(self, channels: int) -> Draws:
        """Return the steps of B ``channels`` grey images: the channels of B images that are not RGB."""
        return self.of(np.repeat(np.arange(len(self.flip)), channels))


@dataclass(frozen=True)
class Look:
    """Colour space and normalisation of the output: value v of channel c becomes scale_c v + shift_c."""

    color_space: ColorSpace
    scale: NDArray[np.float32]  # [C]
    shift: NDArray[np.float32]  # [C]

    @classmethod
    def unchanged(cls) -> Look:
        """Return the look that leaves the values of a single channel as they are."""
        return cls("rgb", np.ones(1, np.float32), np.zeros(1, np.float32))

    @classmethod
    def of(cls, recipe: ViewRecipe) -> Look:
        """Return the look of a recipe's pixels."""
        return cls(recipe.color_space, *normalisation(recipe.color_space, recipe.mean, recipe.std))


def draws(view: View, channels: int, parameters: Parameters, number: int) -> Draws:
    """Return the steps that the graph leaves for view ``number``.

    RandAugment follows colours and blur. So with RandAugment, the graph does them.
    """
    in_graph = view.rand_augment > 0
    color_here = colored(view) and not in_graph
    color = parameters.color[number]
    matrix, share = color_matrix(color, channels) if color_here else (None, None)
    hue = color[:, 3] if color_here and channels == 3 else np.zeros(len(color), np.float32)
    sigma = np.zeros_like(parameters.sigma[number]) if in_graph else parameters.sigma[number]
    return Draws(hue, matrix, share, sigma, parameters.solarize[number], parameters.flip[number])


def colored(view: View) -> bool:
    """Return whether a view's colours may change."""
    return view.grey > 0 or (view.jitter_p > 0 and any(view.jitter))


def color_matrix(color: NDArray[np.float32], channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the matrix [B, C, C] and the share of the mean [B] for 8-bit values, from ``Parameters.color`` [B, 4].

        x -> b (c (s x + (1 - s) l(x) - m) + m) = matrix x + share m

    with brightness b, contrast c, saturation s, luma l, and m the mean of l over the view. Saturation 0 is grey.
    Without RGB there is no saturation, the matrix is [B, 1, 1], and each channel has its own m. Saturation keeps luma,
    and b scales m with x. So any order of the three gives this result, except for values that torchvision clips in
    between.
    """
    channels = 3 if channels == 3 else 1
    brightness, contrast, saturation, _ = color.astype(np.float64).T[:, :, None, None]
    grey = np.tile(luma(channels), (channels, 1))
    matrix = brightness * contrast * (saturation * np.eye(channels) + (1 - saturation) * grey)
    return matrix.astype(np.float32), (brightness * (1 - contrast)).astype(np.float32)[:, 0, 0]


def radius(sigma: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return a Gaussian's radius in pixels: three sigmas, so that narrow ones cost little. It is 0 for no blur."""
    return np.ceil(3 * sigma).astype(np.int32)
