"""The random parameters of every view, as a pure function.

Each parameter of a view is a hash of (seed, epoch, image index, view number, parameter number), and depends on nothing
else. So there is no random state to save. A run resumes exactly from (epoch, step), and the same global batch gives
the same views on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import rand_augment
from .recipe import View, ViewRecipe, sides

_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries ten boxes before it falls back to the centre
_PARAMETERS = 64  # hash counters per view: more than needed, so that a new parameter does not change the others
_FRAME = 2 * _ATTEMPTS + 3  # the first counters: box and flip, which the patches of a jigsaw copy from copy 0
_PATCH = 64 / 85  # side of a jigsaw patch / side of its cell: PIRL cuts 64 of 85 pixels from a crop of 255
_ORDER = 0x6F72646572  # "order" in ASCII: makes the order of an epoch independent of the parameters of its views
Floats = NDArray[np.float64]
Box = tuple[Floats, Floats, Floats, Floats]  # y, x, height and width in pixels of the image, each [B]


@dataclass(frozen=True)
class Parameters:
    """The parameters of V views of each of B images. Boxes are in pixels of the image, as (y, x)."""

    start: NDArray[np.float32]  # [V, B, 2] upper left corner of the crop
    end: NDArray[np.float32]  # [V, B, 2] lower right corner, exclusive
    angle: NDArray[np.float32]  # [V, B] degrees
    flip: NDArray[np.bool_]  # [V, B]
    color: NDArray[np.float32]  # [V, B, 4] brightness, contrast, saturation as factors; hue in turns
    sigma: NDArray[np.float32]  # [V, B] pixels of the view; 0 for no blur
    operation: NDArray[np.int32]  # [V, B, rand_augment.MOST] numbers of RandAugment's operations; 0 for none
    strength: NDArray[np.float32]  # [V, B, rand_augment.MOST] in the units of each operation
    solarize: NDArray[np.bool_]  # [V, B]


def draw_parameters(
    recipe: ViewRecipe, seed: int, epoch: int, indices: ArrayLike, heights: ArrayLike, widths: ArrayLike
) -> Parameters:
    """Draw the parameters of all views of the images ``indices`` [B] of ``heights`` x ``widths`` pixels, each [B]."""
    height, width = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    drawn = uniforms(seed, epoch, indices, recipe.n_views * _PARAMETERS).reshape(-1, recipe.n_views, _PARAMETERS)
    copies = [(view, copy) for view in recipe.views for copy in range(view.count)]
    for v, (view, copy) in enumerate(copies):
        if view.jigsaw:
            drawn[:, v, :_FRAME] = drawn[:, v - copy, :_FRAME]
    each = [_draw_view(view, copy, drawn[:, v].T, height, width) for v, (view, copy) in enumerate(copies)]
    fields = [f.name for f in dataclasses.fields(Parameters)]
    return Parameters(**{name: np.stack([one[name] for one in each]) for name in fields})


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return a permutation of ``count`` images. It is the same on every rank, platform and version of NumPy."""
    return np.argsort(uniforms(seed ^ _ORDER, epoch, np.arange(count), 1)[:, 0], kind="stable")


def uniforms(seed: int, epoch: int, indices: ArrayLike, count: int) -> Floats:
    """Return independent uniform numbers in [0, 1), [B, count]: hashes of (seed, epoch, index, column)."""
    # One splitmix64 stream per image. It starts at the hash of the key (seed, epoch, index).
    key = _mix(np.array([seed % 2**64], np.uint64))
    key = _mix(key ^ _mix(np.array([epoch % 2**64], np.uint64) + _GOLDEN))
    key = _mix(key ^ _mix(np.asarray(indices).astype(np.uint64) + _TWICE))
    columns = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    uniform: Floats = (_mix(key[:, None] + columns) >> np.uint64(11)) * 2.0**-53
    return uniform


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, splitmix64's increment
_TWICE = np.uint64(0x3C6EF372FE94F82A)  # 2 * _GOLDEN modulo 2**64


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _draw_view(view: View, copy: int, u: Floats, height: Floats, width: Floats) -> dict[str, NDArray[np.generic]]:
    """Return the parameters of one copy of a view from its uniform numbers ``u`` [_PARAMETERS, B]."""
    if view.center:
        box = _central_box(view.scale[0], _aspect(view), height, width)
    else:
        box = _random_box(view, u[: 2 * _ATTEMPTS + 2], height, width)
    u = u[2 * _ATTEMPTS + 2 :]
    flip = u[0] < view.flip
    if view.jigsaw:
        box = _patch(view.jigsaw, copy, box, flip, u[11:13])
    y, x, h, w = box
    operation, strength = rand_augment.draw(view.rand_augment, view.rand_augment_magnitude, u[13:])
    return {
        "start": np.stack([y, x], -1).astype(np.float32),
        "end": np.stack([y + h, x + w], -1).astype(np.float32),
        "flip": flip,
        "angle": (view.rotate * (2 * u[1] - 1)).astype(np.float32),
        "color": _color(view, u[2:8]),
        "sigma": np.where(u[8] < view.blur, _between(*view.blur_sigma, u[9]), 0).astype(np.float32),
        "operation": operation,
        "strength": strength,
        "solarize": u[10] < view.solarize,
    }


def _random_box(view: View, u: Floats, height: Floats, width: Floats) -> Box:
    """Return the box of torchvision's RandomResizedCrop: the first of ten that fits, else a central one."""
    area = height * width * _between(*view.scale, u[:_ATTEMPTS])
    aspect = _aspect(view)
    ratio = np.exp(_between(math.log(view.ratio[0]), math.log(view.ratio[1]), u[_ATTEMPTS : 2 * _ATTEMPTS])) * aspect
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, any_fits = fits.argmax(0), fits.any(0)
    columns = np.arange(len(height))
    w, h = w[first, columns], h[first, columns]
    # One draw of the corner serves all attempts: it is independent of which attempt succeeded.
    y, x = np.floor(u[-2] * (height - h + 1)), np.floor(u[-1] * (width - w + 1))
    narrowest, widest = view.ratio[0] * aspect, view.ratio[1] * aspect
    w0 = np.where(width / height > widest, np.rint(height * widest), width)
    h0 = np.where(width / height < narrowest, np.rint(width / narrowest), height)
    y0, x0 = (height - h0) // 2, (width - w0) // 2
    return np.where(any_fits, y, y0), np.where(any_fits, x, x0), np.where(any_fits, h, h0), np.where(any_fits, w, w0)


def _aspect(view: View) -> float:
    """Return width / height of a view. Its crops have this shape, up to ``view.ratio``."""
    height, width = sides(view.size)
    return width / height


def _central_box(fraction: float, aspect: float, height: Floats, width: Floats) -> Box:
    side = fraction * np.minimum(height, width / aspect)
    h, w = np.maximum(np.rint(side), 1), np.maximum(np.rint(side * aspect), 1)
    return (height - h) // 2, (width - w) // 2, h, w


def _patch(side: int, cell: int, box: Box, flip: NDArray[np.bool_], u: Floats) -> Box:
    """Return the box of a patch, placed uniformly in its cell. The cells go row by row over the flipped crop."""
    y, x, h, w = box
    row, column = divmod(cell, side)
    unflipped = np.where(flip, side - 1 - column, column)
    h, w = h / side, w / side
    y, x = y + (row + (1 - _PATCH) * u[0]) * h, x + (unflipped + (1 - _PATCH) * u[1]) * w
    return y, x, _PATCH * h, _PATCH * w


def _color(view: View, u: Floats) -> NDArray[np.float32]:
    """Return factors [B, 4] with the distributions of torchvision's ColorJitter.

    Greyscale is saturation 0. It commutes with the other factors except for clipping.
    """
    jittered = u[0] < view.jitter_p
    factors = [_between(max(0.0, 1 - s), 1 + s, u[1 + k]) for k, s in enumerate(view.jitter[:3])]
    brightness, contrast, saturation = (np.where(jittered, factor, 1.0) for factor in factors)
    hue = np.where(jittered, view.jitter[3] * (2 * u[4] - 1), 0.0)
    saturation = np.where(u[5] < view.grey, 0.0, saturation)
    return np.stack([brightness, contrast, saturation, hue], -1).astype(np.float32)


def _between(low: float, high: float, u: Floats) -> Floats:
    return low + (high - low) * u
