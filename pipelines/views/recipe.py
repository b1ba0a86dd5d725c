"""The views of an image as data: one :class:`View` per kind, and the :class:`ViewRecipe` that holds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np

from . import rand_augment
from .color import COLOR_SPACES, ColorSpace

MOST_CHANNELS = 16
_SMALL = 64  # pixels: an evaluation sees all of an image up to this size, because small images are framed tightly
Interpolation = Literal["linear", "cubic"]
Size = int | tuple[int, int]
"""Side of a square in pixels, or its (height, width)."""


def sides(size: Size) -> tuple[int, int]:
    """Return height and width of a view in pixels."""
    return (size, size) if isinstance(size, int) else size


def size_text(size: Size) -> str:
    """Return ``224`` for a square view, and ``224 x 112`` for a view of 224 rows and 112 columns."""
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"


@dataclass(frozen=True)
class View:
    """One kind of view. Each image gets ``count`` copies, each with its own parameters.

    Raises ValueError if a value is out of range.
    """

    size: Size  # pixels: the side of a square view, or (height, width)
    count: int = 1
    scale: tuple[float, float] = (0.08, 1.0)  # crop area as a fraction of the image's area, uniform
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # crop width / height, relative to the view's own; log-uniform
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
    local: bool = False  # a local view of multi-crop, which only the student sees
    jigsaw: int = 0  # PIRL: the copies are patches of one crop; copy i is from cell i of a jigsaw x jigsaw grid

    def __post_init__(self) -> None:
        _require(min(sides(self.size)) >= 1, f"size: must be at least 1 pixel, got {self.size}")
        height, width = sides(self.size)
        object.__setattr__(self, "size", height if height == width else (height, width))  # one form per size
        _require(self.count >= 1, f"count: must be at least 1, got {self.count}. To drop the view, remove it.")
        low, high = self.scale
        _require(0 < low <= high <= 1, f"scale: must be two area fractions, 0 < low <= high <= 1, got {self.scale}")
        _require(0 < self.ratio[0] <= self.ratio[1], f"ratio: must be 0 < low <= high, got {self.ratio}")
        _require(0 <= self.rotate <= 180, f"rotate: must be between 0 and 180 degrees, got {self.rotate}")
        for name in ("flip", "jitter_p", "grey", "blur", "solarize"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name}: must be a probability between 0 and 1, got {value}")
        strengths = len(self.jitter) == 4 and min(self.jitter) >= 0
        _require(strengths, f"jitter: must be four strengths of at least 0, got {self.jitter}")
        hue = self.jitter[3]
        _require(hue <= 0.5, f"jitter: the hue strength must be at most 0.5, which is half a turn, got {hue}")
        low, high = self.blur_sigma
        _require(0 < low <= high, f"blur_sigma: must be 0 < low <= high, got {self.blur_sigma}")
        operations, most = self.rand_augment, rand_augment.MOST
        _require(0 <= operations <= most, f"rand_augment: must be 0 to {most} operations, got {operations}")
        magnitude = self.rand_augment_magnitude
        _require(0 <= magnitude <= 10, f"rand_augment_magnitude: must be between 0 and 10, got {magnitude}")
        _require(self.jigsaw >= 0, f"jigsaw: must be the side of the grid, or 0 for none, got {self.jigsaw}")
        if self.jigsaw:
            cells = self.jigsaw**2
            _require(self.count == cells, f"count: must be {cells} for jigsaw {self.jigsaw}, got {self.count}")
            _require(self.local, "local: must be true with jigsaw, got false. Only the student sees the patches.")
            _require(not self.center, "center: must be false with jigsaw, got true. A jigsaw cuts a random crop.")


@dataclass(frozen=True)
class Pixels:
    """The format of the pixels that a network sees: (value - mean) / std per channel of a colour space.

    ``mean`` and ``std`` have one value per channel. They refer to pixel values in [0, 1]. For "lab" they are in Lab's
    own units. ``interpolation`` is the resampling of the crops. Raises ValueError if the values do not fit together.

    ``pixel_range`` maps values that are not 8-bit to 0..255: MIN MAX for all channels, or MIN MAX for each channel.
    Values outside of it are clipped, and NaN becomes MIN. It has no effect on 8-bit images. Without it, other images
    are rejected.
    """

    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "cubic"
    color_space: ColorSpace = "rgb"
    pixel_range: tuple[float, ...] | None = field(default=None, repr=False)  # see __repr__

    def __repr__(self) -> str:
        """Return all fields. Digests of views contain this text, so a field without a value adds nothing to it."""
        names = [f.name for f in dataclasses.fields(self) if f.repr or getattr(self, f.name) is not None]
        return f"Pixels({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __post_init__(self) -> None:
        _require(
            1 <= self.channels <= MOST_CHANNELS, f"channels: must be from 1 to {MOST_CHANNELS}, got {self.channels}"
        )
        for name in ("mean", "std"):
            count = len(getattr(self, name))
            _require(count == self.channels, f"{name}: must have {self.channels} values, one per channel, got {count}")
        _require(min(self.std) > 0, f"std: every value must be above 0, got {self.std}")
        known = self.interpolation in ("linear", "cubic")
        _require(known, f"interpolation: must be 'linear' or 'cubic', got {self.interpolation!r}")
        known = self.color_space in COLOR_SPACES
        _require(known, f"color_space: must be 'rgb', 'lab' or 'ycbcr', got {self.color_space!r}")
        other = self.channels != 3 and self.color_space != "rgb"
        text = f"{self.channels} channel{'s' if self.channels > 1 else ''}"
        _require(not other, f"color_space: must be 'rgb' for {text}, got {self.color_space!r}. Or set channels to 3.")
        if self.pixel_range is not None:
            ends = np.array(self.pixel_range, np.float64)
            _require(
                len(ends) in (2, 2 * self.channels),
                f"pixel_range: must be MIN MAX, or MIN MAX for each of {text}, got {len(ends)} numbers",
            )
            increasing = bool(np.isfinite(ends).all() and (ends[::2] < ends[1::2]).all())
            _require(increasing, f"pixel_range: must be finite with MIN below MAX, got {self.pixel_range}")


@dataclass(frozen=True, init=False)
class ViewRecipe:
    """All views of an image and their pixel format. Global views come first, then local views.

    The pixel format is given as ``pixels``, or as its fields ``channels``, ``mean``, ``std``, ``interpolation``,
    ``color_space`` and ``pixel_range``, which are also attributes. A field that is given replaces the field of
    ``pixels``. Raises ValueError if the views or the pixel format are invalid.
    """

    views: tuple[View, ...]
    pixels: Pixels

    def __init__(
        self,
        views: tuple[View, ...],
        channels: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        interpolation: Interpolation | None = None,
        color_space: ColorSpace | None = None,
        *,
        pixel_range: tuple[float, ...] | None = None,
        pixels: Pixels | None = None,
    ) -> None:
        fields: dict[str, Any] = {
            "channels": channels,
            "mean": mean,
            "std": std,
            "interpolation": interpolation,
            "color_space": color_space,
            "pixel_range": pixel_range,
        }
        changes = {name: value for name, value in fields.items() if value is not None}
        object.__setattr__(self, "views", views)
        object.__setattr__(self, "pixels", dataclasses.replace(pixels or Pixels(), **changes))
        _require(len(views) > 0, "views: must hold at least one view, got none")
        order = [view.local for view in views]
        _require(order == sorted(order), "views: must list the global views first, got a global view after a local one")
        _require(not all(order), "views: must hold at least one global view (local: false), got local views only")

    @property
    def channels(self) -> int:
        """Channels of a view, 1 to 16."""
        return self.pixels.channels

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, see :class:`Pixels`."""
        return self.pixels.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, see :class:`Pixels`."""
        return self.pixels.std

    @property
    def interpolation(self) -> Interpolation:
        """Resampling of the crops."""
        return self.pixels.interpolation

    @property
    def color_space(self) -> ColorSpace:
        """Colour space of the finished views. The conversion follows all other operations."""
        return self.pixels.color_space

    @property
    def pixel_range(self) -> tuple[float, ...] | None:
        """Range of values that are not 8-bit, see :class:`Pixels`."""
        return self.pixels.pixel_range

    @property
    def each(self) -> tuple[View, ...]:
        """The views one by one, with their copies, in the order of their numbers."""
        return tuple(view for view in self.views for _ in range(view.count))

    @property
    def n_views(self) -> int:
        """Number of views per image."""
        return len(self.each)

    @property
    def n_global(self) -> int:
        """Number of global views per image. The teacher sees them too, and they come first."""
        return sum(not view.local for view in self.each)

    @property
    def groups(self) -> tuple[tuple[Size, int], ...]:
        """Resolution groups (size in pixels, number of views): runs of consecutive views of equal size."""
        return tuple((size, len(list(run))) for size, run in groupby(view.size for view in self.each))


def evaluation_view(recipe: ViewRecipe, size: Size) -> ViewRecipe:
    """Return a recipe of one view without randomness, in the recipe's pixel format.

    The view is the central square, or the largest central rectangle of the view's shape. It has the whole side of a
    small image, and 7/8 of the side for a ``size`` above 64.
    """
    fraction = 1.0 if max(sides(size)) <= _SMALL else 0.875
    view = View(size=size, scale=(fraction, fraction), flip=0.0, center=True)
    return ViewRecipe((view,), pixels=recipe.pixels)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
