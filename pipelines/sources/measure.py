"""Measure the pixel format of a source on a sample of its images: channels, range, mean and standard deviation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from ..views.recipe import Pixels
from .base import Source
from .decode import MissingPackageError, Raster, as_raster, decode, is_plain, to_pixels
from .headers import BadImageError

_IMAGES = 64  # evenly spaced
_PIXELS = 4096  # of each image, evenly spaced
_PERCENTILES = (0.1, 99.9)  # so that a few dead or saturated pixels do not set the range
_THREADS = 4
_LEAST_STD = 1 / 255  # a level: a constant channel has no spread to divide by


@dataclass(frozen=True)
class _Image:
    name: str
    file: bytes | None  # of an 8-bit image that DALI decodes; it is decoded here only if needed
    raster: Raster | None  # some pixels of any other image

    @property
    def channels(self) -> int:
        return 3 if self.raster is None else self.raster.channels

    @property
    def values(self) -> Raster:
        return self.raster if self.raster is not None else _thinned(decode(self.file or b""))


def measured(source: Source, pixels: Pixels, stated: Collection[str] = ()) -> tuple[Pixels, list[str]]:
    """Return the pixel format for the images of a source, and lines that report what was measured.

    Fields of ``pixels`` that are in ``stated`` stay. The others stay too for 8-bit images of one or three channels.
    Else the number of channels is the images' own. The range of values that are not 8-bit is measured: over all
    channels for grey and RGB, else per channel. Mean and standard deviation are measured on the mapped values.

    Raise DataError if the images differ in their number of channels or do not have the stated one, or if a package that
    reads them is missing.
    """
    if {"channels", "mean", "std", "pixel_range"} <= set(stated):
        return pixels, []
    images = _sample(source)
    if not images:
        return pixels, []  # the loader reports why none can be read
    channels = pixels.channels if "channels" in stated else _channels(source, images, pixels.channels)
    if not any(_fits(image, channels) for image in images):
        raise DataError(f"{source.name}: the images have {images[0].channels} channels, not {channels}")
    wide = [image.raster for image in images if image.raster is not None and image.raster.needs_range]
    fourth = channels == 3 and any(image.raster is not None and image.raster.channels == 4 for image in images)
    lines, pixel_range = ["the fourth channel of the images is left out"] * fourth, pixels.pixel_range
    if wide:
        if pixel_range is None:
            _check_types(source, wide)
        pixel_range, line = (pixel_range, "") if pixel_range else _range(wide, channels)
        types = " and ".join(sorted({raster.values.dtype.name for raster in wide}))
        lines += [f"{types} values {_span(pixel_range)} become 0 to 255{line}"]
    elif "pixel_range" in stated:
        lines.append("pixel_range: has no effect, because the values are 8-bit")
    new_channels = channels != pixels.channels or "channels" in stated
    needs_mean = (bool(wide) or (channels != 3 and new_channels)) and pixels.color_space == "rgb"
    values: dict[str, Any] = {"channels": channels, "pixel_range": pixel_range}
    if needs_mean and not {"mean", "std"} <= set(stated):
        values |= _moments(source, images, channels, pixel_range)
        values = {name: value for name, value in values.items() if name not in stated or name == "channels"}
        shown = "; ".join(f"{name} {_list(values[name])}" for name in ("mean", "std") if name in values)
        lines.append(f"{channels} channel{'s' * (channels > 1)}: {shown} of 0 to 1, measured on {len(images)} images")
    return (dataclasses.replace(pixels, **values), lines) if values != _own(pixels, values) else (pixels, lines)


def _own(pixels: Pixels, names: Collection[str]) -> dict[str, Any]:
    return {name: getattr(pixels, name) for name in names}


def _sample(source: Source) -> list[_Image]:
    count = min(_IMAGES, len(source))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fasttrain-measure") as pool:
        images = pool.map(lambda k: _read(source, k * len(source) // count), range(count))
        return [image for image in images if image is not None]


def _read(source: Source, i: int) -> _Image | None:
    try:
        data = source.read(i)
        if not source.encoded:
            return _Image(source.describe(i), None, _thinned(as_raster(data)))
        content = data.tobytes()
        plain = is_plain(content)
        return _Image(source.describe(i), content if plain else None, None if plain else _thinned(decode(content)))
    except MissingPackageError as error:
        raise DataError(f"{source.describe(i)}: {error}") from None
    except (OSError, BadImageError):
        return None  # the loader reports and skips it


def _thinned(raster: Raster) -> Raster:
    height, width = raster.values.shape[:2]
    step = math.ceil(math.sqrt(height * width / _PIXELS))
    return Raster(raster.values[::step, ::step].copy(), raster.alpha)


def _channels(source: Source, images: Sequence[_Image], usual: int) -> int:
    """Return the number of channels of the images, or the usual one for grey and RGB."""
    examples: dict[int, str] = {}
    for image in images:
        examples.setdefault(3 if image.channels == 1 else image.channels, image.name)
    if set(examples) == {3}:
        return usual
    if len(examples) > 1:
        both = ", ".join(f"{count} in {name}" for count, name in list(examples.items())[:2])
        raise DataError(f"{source.name}: the images differ in their number of channels, {both}; separate them")
    return next(iter(examples))


def _fits(image: _Image, channels: int) -> bool:
    """Return whether an image can have this number of channels: its own, with opacity, or grey as RGB and back."""
    own = image.channels
    alpha = image.raster is not None and image.raster.alpha and own + 1 == channels
    return own == channels or alpha or {own, channels} == {1, 3} or (own, channels) == (4, 3)


def _check_types(source: Source, rasters: Sequence[Raster]) -> None:
    """Raise DataError if one range cannot fit the values: integers and floats, or no number at all."""
    kinds = {raster.values.dtype.kind == "f": raster.values.dtype.name for raster in rasters}
    if len(kinds) > 1:
        raise DataError(f"{source.name}: the images have {kinds[False]} and {kinds[True]} values; separate them")
    if not any(np.isfinite(raster.values).any() for raster in rasters):
        raise DataError(f"{source.name}: the sampled images have no finite value; remove them")


def _range(rasters: Sequence[Raster], channels: int) -> tuple[tuple[float, ...], str]:
    each = [raster.values[..., : raster.channels] for raster in rasters]
    separate = channels not in (1, 3) and all(values.shape[-1] == channels for values in each)
    columns = channels if separate else 1
    flat = [values.reshape(-1, columns if separate else values.shape[-1]) for values in each]
    parts = [np.concatenate([values[:, k] if separate else values.ravel() for values in flat]) for k in range(columns)]
    ends = tuple(float(f"{end:.6g}") for part in parts for end in _ends(part))
    return ends, f", {_PERCENTILES[0]:g} to {_PERCENTILES[1]:g} % of the values of {len(rasters)} images (pixel_range)"


def _ends(values: NDArray[Any]) -> tuple[float, float]:
    """Return the range of some values. It is never empty. A channel without a finite value gets 0 to 1."""
    numbers = values[np.isfinite(values)].astype(np.float64)
    if not len(numbers):
        return 0.0, 1.0
    low, high = np.percentile(numbers, _PERCENTILES)
    if low == high:
        low, high = numbers.min(), numbers.max()
    return float(low), float(high if high > low else low + 1)


def _moments(
    source: Source, images: Sequence[_Image], channels: int, pixel_range: tuple[float, ...] | None
) -> dict[str, tuple[float, ...]]:
    """Return mean and standard deviation per channel of the values in [0, 1]."""
    rows, problem = [], ""
    for image in images:
        try:
            rows.append(to_pixels(image.values, channels, pixel_range).reshape(-1, channels))
        except BadImageError as error:
            problem = problem or f"{image.name}: {error}"
    if not rows:
        raise DataError(f"{problem}. Leave --channels out, or give the images' own number.")
    values = np.concatenate(rows) / 255
    mean, std = (tuple(round(float(v), 4) for v in part) for part in (values.mean(0), values.std(0)))
    return {"mean": mean, "std": tuple(max(v, round(_LEAST_STD, 4)) for v in std)}


def _span(ends: tuple[float, ...] | None) -> str:
    pairs = [f"{low:g} to {high:g}" for low, high in zip((ends or ())[::2], (ends or ())[1::2], strict=True)]
    return pairs[0] if len(pairs) == 1 else f"({'; '.join(pairs)} by channel)"


def _list(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
