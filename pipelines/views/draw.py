"""What the views are, as data, and the random parameters of every view as a pure function.

The parameters of a view depend on (seed, epoch, image index, view number, parameter number) and on nothing else: each
is a hash of these five. So there is no random state to save, a run restarts exactly from (epoch, step), and the same
global batch gives the same views on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import rand_augment
from .color import COLOR_SPACES, ColorSpace

_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries ten boxes before it falls back to the centre
_PARAMETERS = 64  # hash counters reserved for a view; more than are used, so that adding one keeps the others
_FRAME = 2 * _ATTEMPTS + 3  # the first counters: box and flip, which the patches of a jigsaw have from copy 0
_PATCH = 64 / 85  # side of a jigsaw patch to that of its cell; PIRL cuts 64 of 85 pixels out of a crop of 255
_SMALL = 64  # pixels: up to this size images are framed tightly, and evaluation sees all of them
_ORDER = 0x6F72646572  # "order": keeps the order of an epoch independent of its views' parameters
Floats = NDArray[np.float64]
Box = tuple[Floats, Floats, Floats, Floats]  # y, x, height and width in pixels of the image, each [B]


@dataclass(frozen=True)
class View:
    """One kind of view; ``count`` copies are drawn per image, each with its own parameters."""

    size: int  # pixels, square
    count: int = 1
    scale: tuple[float, float] = (0.08, 1.0)  # crop area as a fraction of the image's, uniform
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # crop width / height, log-uniform
    rotate: float = 0.0  # degrees, uniform in +-rotate, after the crop; the corners become black
    flip: float = 0.5  # probability of a left-right flip
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue strengths
    jitter_p: float = 0.8
    grey: float = 0.0  # probability
    blur: float = 0.0  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels of the view, uniform
    solarize: float = 0.0  # probability; values from 128 up are inverted
    rand_augment: int = 0  # operations of RandAugment, after the blur; see rand_augment.py
    rand_augment_magnitude: float = 10.0  # of 10
    center: bool = False  # no random crop: the central square whose side is scale[0] of the shorter side
    local: bool = False  # multi-crop local view, seen by the student only
    jigsaw: int = 0  # PIRL: the copies are patches of one crop, copy i from cell i of a jigsaw x jigsaw grid

    def __post_init__(self) -> None:
        _require(self.size >= 1, f"size is {self.size}; a view needs at least 1 pixel")
        _require(self.count >= 1, f"count is {self.count}; leave the view out instead, or use 1 or more")
        low, high = self.scale
        _require(0 < low <= high <= 1, f"scale is {self.scale}; use two area fractions with 0 < low <= high <= 1")
        _require(0 < self.ratio[0] <= self.ratio[1], f"ratio is {self.ratio}; use 0 < low <= high")
        _require(0 <= self.rotate <= 180, f"rotate is {self.rotate}; use degrees between 0 and 180")
        for name in ("flip", "jitter_p", "grey", "blur", "solarize"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} is {value}; a probability lies between 0 and 1")
        _require(len(self.jitter) == 4 and min(self.jitter) >= 0, f"jitter is {self.jitter}; use four strengths >= 0")
        _require(self.jitter[3] <= 0.5, f"jitter has hue strength {self.jitter[3]}; half a turn, 0.5, is the most")
        _require(0 < self.blur_sigma[0] <= self.blur_sigma[1], f"blur_sigma is {self.blur_sigma}; use 0 < low <= high")
        most, magnitude = rand_augment.MOST, self.rand_augment_magnitude
        _require(0 <= self.rand_augment <= most, f"rand_augment is {self.rand_augment}; use 0 to {most} operations")
        _require(0 <= magnitude <= 10, f"rand_augment_magnitude is {magnitude}; use a number between 0 and 10")
        _require(self.jigsaw >= 0, f"jigsaw is {self.jigsaw}; use the side of the grid, or 0 for none")
        if self.jigsaw:
            cells = self.jigsaw**2
            _require(self.count == cells, f"jigsaw is {self.jigsaw} and count {self.count}; set count to {cells}")
            _require(self.local, "jigsaw patches are seen by the student only; set local to true")
            _require(not self.center, "jigsaw cuts a random crop; set center to false")


@dataclass(frozen=True)
class ViewRecipe:
    """All views of an image: global ones first, then local ones; and how their pixels are normalised."""

    views: tuple[View, ...]
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of pixel values in [0, 1]; for "lab" in Lab's own units
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["linear", "cubic"] = "cubic"
    color_space: ColorSpace = "rgb"  # of the views' pixels, converted after everything else; see color.convert

    def __post_init__(self) -> None:
        _require(len(self.views) > 0, "views is empty; a recipe needs at least one view")
        order = [view.local for view in self.views]
        _require(order == sorted(order), "views has a global view after a local one; list the global views first")
        _require(not all(order), "views has local views only; make at least one of them global (local: false)")
        _require(self.channels in (1, 3), f"channels is {self.channels}; use 1 (grey) or 3 (RGB)")
        for name in ("mean", "std"):
            value = getattr(self, name)
            _require(len(value) == self.channels, f"{name} has {len(value)} values for {self.channels} channel(s)")
        _require(min(self.std) > 0, f"std is {self.std}; every value must be positive")
        known = self.interpolation in ("linear", "cubic")
        _require(known, f"interpolation is {self.interpolation!r}; use 'linear' or 'cubic'")
        known = self.color_space in COLOR_SPACES
        _require(known, f"color_space is {self.color_space!r}; use 'rgb', 'lab' or 'ycbcr'")
        grey = self.channels == 1 and self.color_space != "rgb"
        _require(not grey, f"color_space is {self.color_space!r} for 1 channel; use 'rgb', or set channels to 3")

    @property
    def each(self) -> tuple[View, ...]:
        """The views one by one, copies unrolled, in the order in which they are numbered."""
        return tuple(view for view in self.views for _ in range(view.count))

    @property
    def n_views(self) -> int:
        """Views of an image."""
        return len(self.each)

    @property
    def n_global(self) -> int:
        """Views of an image that the teacher sees too; they come first."""
        return sum(not view.local for view in self.each)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Resolution groups (size in pixels, number of views): runs of consecutive views of equal size."""
        return tuple((size, len(list(run))) for size, run in groupby(view.size for view in self.each))


@dataclass(frozen=True)
class Parameters:
    """What happens to each of B images in each of V views. Boxes are in pixels of the image, as (y, x)."""

    start: NDArray[np.float32]  # [V, B, 2] upper left corner of the crop
    end: NDArray[np.float32]  # [V, B, 2] lower right corner, exclusive
    angle: NDArray[np.float32]  # [V, B] degrees
    flip: NDArray[np.bool_]  # [V, B]
    color: NDArray[np.float32]  # [V, B, 4] brightness, contrast, saturation as factors; hue in turns
    sigma: NDArray[np.float32]  # [V, B] pixels of the view; 0 where there is no blur
    operation: NDArray[np.int32]  # [V, B, rand_augment.MOST] numbers of RandAugment's operations, 0 for none
    strength: NDArray[np.float32]  # [V, B, rand_augment.MOST] in each operation's own units
    solarize: NDArray[np.bool_]  # [V, B]


def evaluation_view(recipe: ViewRecipe, size: int) -> ViewRecipe:
    """One view without randomness: the central square, whole for small images and 7/8 of the side above 64 pixels."""
    fraction = 1.0 if size <= _SMALL else 0.875
    view = View(size=size, scale=(fraction, fraction), flip=0.0, center=True)
    return dataclasses.replace(recipe, views=(view,))


def draw_parameters(
    recipe: ViewRecipe, seed: int, epoch: int, indices: ArrayLike, heights: ArrayLike, widths: ArrayLike
) -> Parameters:
    """Draw the parameters of all views of the images ``indices`` [B], which are ``heights`` x ``widths`` pixels."""
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
    """Shuffle ``count`` images for an epoch: the same permutation on every rank, platform and version of numpy."""
    return np.argsort(uniforms(seed ^ _ORDER, epoch, np.arange(count), 1)[:, 0], kind="stable")


def uniforms(seed: int, epoch: int, indices: ArrayLike, count: int) -> Floats:
    """Independent uniform numbers in [0, 1), [B, count]: a hash of (seed, epoch, index, column)."""
    # One splitmix64 stream an image; its starting point is the key (seed, epoch, index) hashed link by link.
    key = _mix(np.array([seed % 2**64], np.uint64))
    key = _mix(key ^ _mix(np.array([epoch % 2**64], np.uint64) + _GOLDEN))
    key = _mix(key ^ _mix(np.asarray(indices).astype(np.uint64) + _TWICE))
    columns = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    uniform: Floats = (_mix(key[:, None] + columns) >> np.uint64(11)) * 2.0**-53
    return uniform


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, splitmix64's increment
_TWICE = np.uint64(0x3C6EF372FE94F82A)  # 2 * _GOLDEN modulo 2**64


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalise as splitmix64 does (Steele, Lea, Flood 2014): every input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _draw_view(view: View, copy: int, u: Floats, height: Floats, width: Floats) -> dict[str, NDArray[np.generic]]:
    """Parameters of a copy of a view from its uniform numbers ``u`` [_PARAMETERS, B]."""
    if view.center:
        box = _central_square(view.scale[0], height, width)
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
    """Box of RandomResizedCrop in torchvision: the first of ten that fits, else a central one."""
    area = height * width * _between(*view.scale, u[:_ATTEMPTS])
    ratio = np.exp(_between(math.log(view.ratio[0]), math.log(view.ratio[1]), u[_ATTEMPTS : 2 * _ATTEMPTS]))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, found = fits.argmax(0), fits.any(0)
    columns = np.arange(len(height))
    w, h = w[first, columns], h[first, columns]
    # The corner needs no draw of its own per attempt: it is independent of which attempt succeeded.
    y, x = np.floor(u[-2] * (height - h + 1)), np.floor(u[-1] * (width - w + 1))
    w0 = np.where(width / height > view.ratio[1], np.rint(height * view.ratio[1]), width)
    h0 = np.where(width / height < view.ratio[0], np.rint(width / view.ratio[0]), height)
    y0, x0 = (height - h0) // 2, (width - w0) // 2
    return np.where(found, y, y0), np.where(found, x, x0), np.where(found, h, h0), np.where(found, w, w0)


def _central_square(fraction: float, height: Floats, width: Floats) -> Box:
    side = np.maximum(np.rint(fraction * np.minimum(height, width)), 1)
    return (height - side) // 2, (width - side) // 2, side, side


def _patch(side: int, cell: int, box: Box, flip: NDArray[np.bool_], u: Floats) -> Box:
    """Box of a patch, placed uniformly in its cell; the cells go row by row over the flipped crop."""
    y, x, h, w = box
    row, column = divmod(cell, side)
    unflipped = np.where(flip, side - 1 - column, column)
    h, w = h / side, w / side
    y, x = y + (row + (1 - _PATCH) * u[0]) * h, x + (unflipped + (1 - _PATCH) * u[1]) * w
    return y, x, _PATCH * h, _PATCH * w


def _color(view: View, u: Floats) -> NDArray[np.float32]:
    """Factors [B, 4] with the laws of torchvision's ColorJitter; grey is saturation 0: it commutes but for clipping."""
    jittered = u[0] < view.jitter_p
    factors = [_between(max(0.0, 1 - s), 1 + s, u[1 + k]) for k, s in enumerate(view.jitter[:3])]
    brightness, contrast, saturation = (np.where(jittered, factor, 1.0) for factor in factors)
    hue = np.where(jittered, view.jitter[3] * (2 * u[4] - 1), 0.0)
    saturation = np.where(u[5] < view.grey, 0.0, saturation)
    return np.stack([brightness, contrast, saturation, hue], -1).astype(np.float32)


def _between(low: float, high: float, u: Floats) -> Floats:
    return low + (high - low) * u


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"view recipe: {message}")
