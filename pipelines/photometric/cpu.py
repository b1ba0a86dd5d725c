"""The photometric pass on the CPU: NumPy over planes, hue and blur in 16 bits.

The other colours are one 3 x 3 matrix in fp32. The blur is separable. Its weights are 256ths, and no sum exceeds 16
bits, because 255 * 256 < 65,536. So an instruction handles twice as many values as in fp32, in half the memory. Planes
of any shape are blurred as one long line: a neighbour k rows up is k * S values back, so each call of NumPy covers all
of them. Every operation is exact or rounds each value once, so a view does not depend on the other images. NumPy starts
no threads, which would compete with the trainer's, and releases Python's lock while it works.

Measurements (one core, 96 and 224 pixels, ns per value): 1.2 without blur, 1.7 to 3 with it, and 1.2 more for hue. The
blur in fp32 took 8 to 14. torch.compile's C++ took 1.7 and 3.4, after 5 to 18 s of compilation per size and window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..views.color import INTERCEPT, KNEE, RELATIVE_XYZ, SLOPE, YCBCR, YCBCR_OFFSET, linear_light, luma
from ..views.recipe import Size, sides
from .draws import Draws, Look, radius

_PIXELS = 160_000  # per piece: fewer calls and handovers between threads gain more than the second-level cache
_LIGHT = linear_light()
_BLACK = np.float32(0)
_WHITE = np.float32(255.5)  # becomes 255 when the fraction is dropped
Planes = NDArray[np.uint16]  # [3, n, H * W] of RGB, else [1, n * C, H * W]; values of 8 bits
Floats = NDArray[np.float32]


class Scratch:
    """Memory that the pieces of one thread share."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[Any]] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
        """Return an array of undefined content. The next one of this name may be the same memory."""
        size = int(np.prod(shape))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, dtype)
        return buffer[:size].reshape(shape)


def pieces(draws: Draws, size: Size) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of images that are processed together. They have the same window, solarisation and flip."""
    kind = 4 * radius(draws.sigma) + 2 * draws.solarize + draws.flip
    most = max(1, _PIXELS // math.prod(sides(size)))
    for one in np.unique(kind):
        rows = np.flatnonzero(kind == one)
        yield from np.split(rows, range(most, len(rows), most))


def finish(pixels: NDArray[np.uint8], draws: Draws, look: Look, out: Floats, scratch: Scratch) -> None:
    """Write the views of ``pixels`` [n, H, W, C], the images of one piece, to ``out`` [n, H, W, C].

    If they are not RGB, their channels are processed like grey images with the same steps.
    """
    n, height, width, channels = pixels.shape
    rgb, area = channels == 3, height * width
    axis, shape = (0, (3, n, area)) if rgb else (1, (n, channels, area))
    planes: Planes = scratch("planes", shape, np.uint16)
    planes[...] = np.moveaxis(pixels.reshape(n, area, channels), -1, axis)
    if not rgb:
        planes, draws = planes.reshape(1, -1, area), draws.per_channel(channels)
    light: Floats = scratch("light", planes.shape, np.float32)
    if draws.hue.any():
        _turn(planes.view(np.int16), draws.hue, scratch)
    if draws.matrix is not None and draws.mean_share is not None:
        light[...] = planes
        offset = draws.mean_share * _mean_grey(light) + np.float32(0.5)
        _mix(light, draws.matrix, np.repeat(offset[:, None], len(planes), 1), planes, scratch)
    reach = int(radius(draws.sigma[0]))
    if reach:
        planes = _blur(planes, draws.sigma, reach, height, width, scratch)
    if draws.solarize[0]:
        np.minimum(planes, np.subtract(255, planes, out=scratch("inverse", planes.shape, np.uint16)), out=planes)
    _convert(planes, light, look, scratch)
    columns = slice(None, None, -1 if draws.flip[0] else 1)
    views = np.moveaxis(out, -1, axis)
    light = light.reshape(views.shape)
    scale, shift = (values.reshape(-1, *(1,) * (3 - axis)) for values in (look.scale, look.shift))
    light *= scale
    np.add(light[..., columns], shift, out=views)


def _turn(planes: NDArray[np.int16], hue: Floats, scratch: Scratch) -> None:
    """Turn the hue of each image by ``hue`` [n] turns in HSV, like ``reference.turn`` but in whole numbers."""
    names = ("high", "low", "chroma", "size")
    high, low, chroma, size = (scratch(name, planes.shape[1:], np.int16) for name in names)
    way, back = (scratch(name, planes.shape, np.int16) for name in ("way", "back"))
    red, green, blue = planes
    np.maximum(np.maximum(red, green, out=high), blue, out=high)
    np.minimum(np.minimum(red, green, out=low), blue, out=low)
    np.subtract(high, low, out=chroma)
    apart, at = np.subtract(green, blue, out=back[0]), way[0]
    np.abs(apart, out=size)
    np.subtract(high, red, out=red)
    np.minimum(red, np.subtract(chroma, size, out=at), out=at)
    at += at
    at += size
    at += red
    apart >>= 15  # -1 where green is less than blue, else 0: the next two lines negate these
    at ^= apart
    at -= apart
    step: Floats = scratch("step", at.shape, np.float32)
    step[...] = chroma
    step *= 6 * hue[:, None]
    np.copyto(size, np.rint(step, out=step), casting="unsafe")
    at += size
    np.multiply(chroma, 2, out=size)
    np.subtract(at, size, out=way[1])
    np.subtract(way[1], size, out=way[2])
    np.abs(way, out=way)  # the distance from each colour
    size *= 3
    np.abs(np.subtract(size, way, out=back), out=back)  # the distance in the other direction
    np.minimum(way, back, out=way)
    np.subtract(np.add(high, chroma, out=size), way, out=way)
    np.minimum(way, high, out=way)
    np.maximum(way, low, out=planes)


def _mean_grey(light: Floats) -> Floats:
    """Return the mean luma [n] of planes [C, n, H * W]. Up to 256 pixels it is exact: sums fit the 24 bits of fp32."""
    means = np.einsum("cnp->cn", light) / np.float32(light.shape[-1])  # a third of the time of sum(-1)
    grey: Floats = sum(weight * mean for weight, mean in zip(luma(len(light)), means, strict=True))
    return grey


def _mix(light: Floats, matrix: Floats, offset: Floats, planes: Planes, scratch: Scratch) -> None:
    """Multiply each pixel by its image's matrix [n, C, C], add the offset [n, C], and clip to 8 bits."""
    total, term = (scratch(name, light.shape[1:], np.float32) for name in ("total", "term"))
    for channel, plane in enumerate(planes):
        np.multiply(light[0], matrix[:, channel, 0, None], out=total)
        for k in range(1, len(light)):
            total += np.multiply(light[k], matrix[:, channel, k, None], out=term)
        total += offset[:, channel, None]
        np.clip(total, _BLACK, _WHITE, out=total)
        np.copyto(plane, total, casting="unsafe")


def _blur(planes: Planes, sigma: Floats, reach: int, height: int, width: int, scratch: Scratch) -> Planes:
    """Blur with a Gaussian, first down the columns, then along the rows. The picture is reflected at its edges."""
    w = weights(sigma, reach)
    lines = planes.reshape(-1, planes.shape[1], height, width)
    before, after = _reflected(height, reach)
    tall = scratch("padded", (*lines.shape[:2], height + 2 * reach, width), np.uint16)
    tall[:, :, reach:-reach] = lines
    tall[:, :, :reach], tall[:, :, -reach:] = lines[:, :, before], lines[:, :, after]
    blurred = scratch("blurred", lines.shape, np.uint16)
    _filter(tall, blurred, w, width, scratch)
    before, after = _reflected(width, reach)
    wide = scratch("padded", (*lines.shape[:2], height, width + 2 * reach), np.uint16)
    wide[..., reach:-reach] = blurred
    wide[..., :reach], wide[..., -reach:] = blurred[..., before], blurred[..., after]
    result = scratch("result", wide.shape, np.uint16)  # the values after the last column are meaningless
    _filter(wide, result, w, 1, scratch)
    lines[...] = result[..., :width]
    return planes


def _reflected(size: int, reach: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixel numbers that continue a line before its start and after its end."""
    reflected = np.pad(np.arange(size), reach, mode="reflect")
    return reflected[:reach], reflected[size + reach :]


def _filter(padded: NDArray[np.uint16], out: NDArray[np.uint16], w: NDArray[np.uint16], step: int, scratch: Scratch
            ) -> None:  # fmt: skip
    """Write the weighted sum of neighbours ``step`` values apart, rounded to 8 bits."""
    reach, shape = w.shape[1] - 1, padded.shape[:2]
    line, total = padded.reshape(*shape, -1), out.reshape(*shape, -1)
    count = line.shape[2] - 2 * reach * step
    total, pair = total[..., :count], scratch("pair", (*shape, count), np.uint16)
    middle = reach * step
    np.multiply(line[..., middle : middle + count], w[:, :1], out=total)
    for k in range(1, reach + 1):
        before, after = middle - k * step, middle + k * step
        np.add(line[..., before : before + count], line[..., after : after + count], out=pair)
        total += np.multiply(pair, w[:, k, None], out=pair)
    total += 128
    total >>= 8


def weights(sigma: Floats, reach: int) -> NDArray[np.uint16]:
    """Return half windows [n, 1 + reach] of Gaussians in 256ths: the middle and one side, w_0 + 2 (w_1 + ...) = 256.

    The tails from k on are rounded, and a weight is the difference of two tails. So the weights keep their sum, and
    none is negative.
    """
    k = np.arange(reach + 1)
    half = np.exp(-0.5 * (k / sigma[:, None].astype(np.float64)) ** 2)
    half /= 2 * half.sum(1, keepdims=True) - 1
    tails = np.rint(256 * half[:, ::-1].cumsum(1)[:, ::-1])
    tails[:, 0] = 256 - tails[:, 1]
    whole: NDArray[np.uint16] = (tails - np.pad(tails[:, 1:], ((0, 0), (0, 1)))).astype(np.uint16)
    return whole


def _convert(planes: Planes, light: Floats, look: Look, scratch: Scratch) -> None:
    """Write the values of the planes in the colour space to ``light``."""
    if look.color_space == "lab":
        _lab(planes, light)
        return
    light[...] = planes
    if look.color_space == "ycbcr":
        _mix(light, YCBCR[None], YCBCR_OFFSET[None], planes, scratch)
        light[...] = planes


def _lab(planes: Planes, light: Floats) -> None:
    """Write L = 116 f(Y) - 16, a = 500 (f(X) - f(Y)), b = 200 (f(Y) - f(Z)), for XYZ relative to white."""
    linear = _LIGHT[planes]
    xyz = [sum(m * plane for m, plane in zip(row, linear, strict=True)) for row in RELATIVE_XYZ]
    x, y, z = (np.where(t > KNEE, np.cbrt(t), np.float32(SLOPE) * t + np.float32(INTERCEPT)) for t in xyz)
    light[0], light[1], light[2] = 116 * y - 16, 500 * (x - y), 200 * (y - z)
