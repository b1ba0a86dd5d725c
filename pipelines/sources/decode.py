"""Decode images on the host: files that DALI does not decode faithfully, and all files of other than 1 or 3 channels.

DALI decodes 8-bit images of one or three channels. It would reduce 16 bits and floats to 8 bits by the range of their
type: 12 bits in uint16 would become 17 levels, and floats from 0 to 255 two. Here such values keep their type, and
``to_pixels`` maps them by a given range.
"""

from __future__ import annotations

import functools
import io
import struct
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..views.recipe import MOST_CHANNELS
from .headers import MOST_PIXELS, BadImageError, image_size, reduction, too_large

_PNG, _NPY = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
_BIG_ENDIAN = b"MM\0+"  # the start of a BigTIFF in this order
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", _BIG_ENDIAN)
_EXACT_IN_PIL = {(16, 1), (16, 2), (32, 2), (32, 3)}  # bits and number format of a TIFF of one band
_BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA, _FORMAT = 258, 262, 277, 338, 339  # tags of TIFF
_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 6: 3}  # samples of the colour spaces that DALI knows: grey, RGB, palette, YCbCr
_CMYK, _CIE_LAB, _ICC_LAB = 5, 8, 9
_LARGE = 1e30  # fp32 ends at 3e38
_LUMA = np.array([0.299, 0.587, 0.114])
_local = threading.local()


class MissingPackageError(BadImageError):
    """The image needs a package that is not installed."""


@dataclass(frozen=True)
class Raster:
    """Decoded values [H, W, C] of any real type."""

    values: NDArray[Any]
    alpha: bool = False  # whether the last channel is opacity

    @property
    def channels(self) -> int:
        """Number of channels without opacity."""
        return int(self.values.shape[-1]) - self.alpha

    @property
    def needs_range(self) -> bool:
        """Whether the values are not 8-bit, so that ``to_pixels`` needs a range."""
        return self.values.dtype not in (np.uint8, np.bool_)


def is_plain(data: bytes) -> bool:
    """Return whether DALI decodes a file faithfully, as far as its header shows."""
    if data[:8] == _PNG:
        return data[24:25] != b"\x10"
    return _is_plain_tiff(data) if data[:4] in _TIFF else data[:6] != _NPY


def decode(data: bytes) -> Raster:
    """Return the values of an image file, upright. Raise BadImageError if it is not a complete image."""
    if data[:6] == _NPY:
        return _from_npy(data)
    if is_plain(data):
        image_size(data)
        return _by_pil(data)
    return _deep_png(data) if data[:8] == _PNG else _tiff(data)


def as_raster(array: NDArray[Any]) -> Raster:
    """Return an array [H, W, C], [H, W] or [C, H, W] as a raster. There are at most 16 channels.

    In an array of three axes the channels come last, unless only the first axis is short enough. Raise BadImageError
    for other shapes and for values that are not real numbers.
    """
    values = array[..., None] if array.ndim == 2 else array
    if values.ndim == 3 and values.shape[-1] > MOST_CHANNELS >= values.shape[0]:
        values = np.moveaxis(values, 0, -1)
    if values.dtype.kind not in "buif" or values.ndim != 3 or not values.size or values.shape[-1] > MOST_CHANNELS:
        form = f"real numbers [H, W, C] with at most {MOST_CHANNELS} channels"
        raise BadImageError(f"an array of {array.dtype} {[*array.shape]}; use {form}")
    if values.shape[0] * values.shape[1] > MOST_PIXELS:
        raise too_large(values.shape[1], values.shape[0])
    return Raster(values)


def from_pil(image: Any) -> Raster:
    """Return the values of a PIL image. 16-bit, 32-bit and float modes keep their type; LAB becomes RGB."""
    if image.mode == "LAB":
        return Raster(_lab_to_rgb(image.size, image.tobytes()))
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return Raster(np.asarray(image)[..., None])
    kept = image.mode in ("L", "LA", "RGB", "RGBA")
    values = np.asarray(image if kept else image.convert("L" if image.mode == "1" else "RGB"))
    return Raster(values[..., None] if values.ndim == 2 else values, alpha=image.mode in ("LA", "RGBA"))


def reduced(raster: Raster) -> Raster:
    """Return a raster, a large one with smaller sides: each value is the mean of a block, see ``reduction``."""
    values = raster.values
    rows, columns = reduction(*values.shape[:2])
    if rows == columns == 1:
        return raster
    height, width = values.shape[0] // rows * rows, values.shape[1] // columns * columns
    kind = np.float32 if values.dtype.itemsize <= 2 or values.dtype == np.float32 else np.float64
    total = np.zeros((height // rows, width // columns, values.shape[2]), kind)
    for row in range(rows):
        for column in range(columns):
            total += values[row:height:rows, column:width:columns]
    total /= rows * columns
    return Raster((total if values.dtype.kind == "f" else np.rint(total)).astype(values.dtype), raster.alpha)


def to_pixels(raster: Raster, channels: int, pixel_range: tuple[float, ...] | None) -> NDArray[np.uint8]:
    """Return 8-bit pixels [H, W, channels].

    Grey and RGB are converted into each other. Opacity is dropped if the number of channels does not include it, and
    so is the fourth channel for three. ``pixel_range`` is the field of ``Pixels``. Raise BadImageError for another
    number of channels, and for values that need a range without one.
    """
    values, count = raster.values, raster.values.shape[-1]
    if count != channels and (raster.alpha or (count, channels) == (4, 3)):
        values, count = values[..., :-1], count - 1
    if count != channels and {count, channels} != {1, 3}:
        raise BadImageError(f"it has {raster.channels} channels, not {channels}")
    if values.dtype == np.bool_:
        values = values * np.uint8(255)
    elif raster.needs_range:
        if pixel_range is None:
            raise BadImageError(f"its values are {values.dtype.name} of an unknown range; give --pixel_range MIN MAX")
        values = _in_8_bits(values, np.array(pixel_range, np.float64))
    return _with_channels(values, channels)


def pnm(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels [H, W, 1 or 3] as an uncompressed file, which DALI decodes."""
    height, width, channels = pixels.shape
    header = b"P%d %d %d 255\n" % (5 if channels == 1 else 6, width, height)
    return np.frombuffer(header + pixels.tobytes(), np.uint8)


def _in_8_bits(values: NDArray[Any], ends: NDArray[np.float64]) -> NDArray[np.uint8]:
    wide = values.dtype.itemsize > (4 if values.dtype.kind == "f" else 2)  # fp32 holds 24 bits
    kind = np.float64 if wide or np.abs(ends).max() > _LARGE else np.float32
    low, high = ends[::2].astype(kind), ends[1::2].astype(kind)
    scaled = (values.astype(kind) - low) * (255 / (high - low))
    np.nan_to_num(scaled, copy=False, nan=0, posinf=255, neginf=0)
    pixels: NDArray[np.uint8] = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return pixels


def _with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Convert pixels [H, W, C] between grey and RGB."""
    if image.shape[-1] == channels:
        return np.ascontiguousarray(image)
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    grey: NDArray[np.uint8] = np.rint(image @ _LUMA)[..., None].astype(np.uint8)
    return grey


def _from_npy(data: bytes) -> Raster:
    try:
        return as_raster(np.load(io.BytesIO(data), allow_pickle=False))
    except BadImageError:
        raise
    except (ValueError, EOFError, OSError) as error:
        raise BadImageError(f"unreadable: {error}") from None


def _by_pil(data: bytes) -> Raster:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            return from_pil(ImageOps.exif_transpose(_reduced_by_pil(image)))
    except (OSError, SyntaxError) as error:
        raise BadImageError(f"unreadable: {error}") from None


def _reduced_by_pil(image: Any) -> Any:
    """Return the same as ``reduced`` for 8-bit images, before they are copied to be turned and converted."""
    rows, columns = reduction(image.height, image.width)
    if rows == columns == 1 or image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return image
    exif = image.getexif().tobytes()
    kept = image if image.mode in ("L", "LA", "RGB", "RGBA", "LAB") else image.convert("RGB")
    box = (0, 0, image.width // columns * columns, image.height // rows * rows)
    small = kept.reduce((columns, rows), box)
    small.info["exif"] = exif
    return small


def _deep_png(data: bytes) -> Raster:
    """Decode a PNG of 16 bits with DALI's decoder. PIL would drop the lower 8 bits of RGB."""
    from nvidia import nvimgcodec as codec

    image_size(data)
    if not hasattr(_local, "decoder"):  # one per thread
        backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
        _local.decoder = codec.Decoder(device_id=_CPU_ONLY, backends=backends)
    grey, opaque = data[25] in (0, 4), data[25] != 6
    space = codec.ColorSpec.GRAY if grey else codec.ColorSpec.SRGB if opaque else codec.ColorSpec.UNCHANGED
    image = _local.decoder.decode(data, params=codec.DecodeParams(allow_any_depth=True, color_spec=space))
    if image is None:
        raise BadImageError("corrupt: the decoder rejects it")
    return Raster(np.asarray(image.cpu()), alpha=not opaque)


_CPU_ONLY = -99999  # nvImageCodec's number of no device, NVIMGCODEC_DEVICE_CPU_ONLY


def _is_plain_tiff(data: bytes) -> bool:
    """Return whether a TIFF has 8 bits or fewer, a colour space that DALI knows, and no other bands."""
    tags = _tags(data)
    if tags is None:
        return data[:4] != _BIG_ENDIAN  # of a plain file, ``image_size`` reports the reason
    colors = _COLORS.get(tags.get(_PHOTOMETRIC, 0))
    if colors is None or max(tags.get(_BITS, (1,))) > 8 or set(tags.get(_FORMAT, (1,))) - {1, 4}:
        return False
    more = tags.get(_SAMPLES, 1) - colors
    return more == 0 or (more == 1 and tags.get(_EXTRA, ()) in ((), (1,), (2,), 1, 2))


def _tags(data: bytes) -> Any:
    """Return the tags of a TIFF's first image, a mapping, or None if they cannot be read. Reads no pixels."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    if data[:4] == _BIG_ENDIAN:  # PIL takes it for a classic TIFF
        return None
    file = io.BytesIO(data)
    try:
        tags: Any = ImageFileDirectory_v2(data[:16] if b"+" in data[:4] else data[:8])  # + marks a BigTIFF
        file.seek(tags.next)
        tags.load(file)
    except (OSError, SyntaxError, ValueError, struct.error):
        return None
    return tags


def _tiff(data: bytes) -> Raster:
    """Decode a TIFF that is not plain: with PIL if that keeps all of its bits and bands, else with tifffile."""
    tags = _tags(data)
    if tags is None:
        return _by_tifffile(data)
    bits, space = tags.get(_BITS, (1,)), tags.get(_PHOTOMETRIC, 0)
    single = tags.get(_SAMPLES, 1) == 1 and tags.next == 0 and space in (0, 1)  # one band and one page
    exact = (bits[0], tags.get(_FORMAT, (1,))[0]) in _EXACT_IN_PIL
    if (single and exact) or (space in (_CMYK, _CIE_LAB) and set(bits) == {8} and not tags.get(_EXTRA)):
        image_size(data)
        return _by_pil(data)
    return _by_tifffile(data)


def _by_tifffile(data: bytes) -> Raster:
    try:
        import tifffile
    except ImportError:
        raise MissingPackageError("such a TIFF needs tifffile; pip install 'fasttrain[tiff]'") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page, series = file.pages.first, file.series[0]
            if page.imagewidth * page.imagelength > MOST_PIXELS:
                raise too_large(page.imagewidth, page.imagelength)
            ends = [start + count for start, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
            if max(ends, default=0) > len(data):  # tifffile would return zeros
                raise BadImageError("truncated: it ends inside its values")
            stack = series if {"C", "S"} & set(series.axes) else page
            values = _channels_last(stack.asarray(), stack.axes)
            space, extra = int(page.photometric), tuple(int(kind) for kind in page.extrasamples)
            orientation = page.tags.valueof(274, 1)
    except BadImageError:
        raise
    except Exception as error:  # tifffile and its codecs raise any error for a corrupt file
        if "imagecodecs" in str(error):
            raise MissingPackageError("its compression needs imagecodecs; pip install 'fasttrain[tiff]'") from None
        raise BadImageError(f"unreadable: {' '.join(str(error).split())}") from None
    values = _upright(values, int(orientation))
    if space in (_CIE_LAB, _ICC_LAB):
        high = values[..., :3] if values.dtype.itemsize == 1 else values[..., :3].astype(np.uint16) >> 8
        lab = high.astype(np.uint8)
        if space == _CIE_LAB:
            lab[..., 1:] ^= 128  # a and b are signed
        height, width = lab.shape[:2]
        return Raster(_lab_to_rgb((width, height), lab.tobytes()))
    raster = as_raster(values)
    return Raster(raster.values, alpha=len(extra) == 1 and extra[0] in (1, 2))


def _channels_last(values: NDArray[Any], axes: str) -> NDArray[Any]:
    """Return [H, W, C] from the first of each axis that is neither space nor channel."""
    for axis in [name for name in axes if name not in "YXCS"]:
        values, axes = values.take(0, axes.index(axis)), axes.replace(axis, "", 1)
    order = [axes.index("Y"), axes.index("X"), *(k for k, name in enumerate(axes) if name in "CS")]
    values = values.transpose(order)
    return values.reshape(*values.shape[:2], -1)


def _upright(values: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn values [H, W, C] by an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return values[:: -1 if rows else 1, :: -1 if columns else 1]


def _lab_to_rgb(size: tuple[int, int], lab: bytes) -> NDArray[np.uint8]:
    """Return sRGB [H, W, 3] of 8-bit CIE Lab for D50, whose a and b have an offset of 128."""
    from PIL import Image, ImageCms

    converted = ImageCms.applyTransform(Image.frombytes("LAB", size, lab), _lab_transform())
    return np.asarray(converted)


@functools.cache
def _lab_transform() -> Any:
    from PIL import ImageCms

    lab, srgb = (ImageCms.ImageCmsProfile(ImageCms.createProfile(name)) for name in ("LAB", "sRGB"))
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
