"""RandAugment in timm's form, as InfoMin uses it: its random parameters, and its part of the DALI graph.

Some of 15 operations are drawn with replacement. Each is applied with probability 1/2. Its strength follows from a
level l = clip(normal(magnitude, 0.5), 0, 10) / 10 (timm's 'rand-n2-m10-mstd0.5'). In the graph, similar operations
share a branch, and an image passes only through the branch that was drawn for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COUNTERS = 5  # uniform numbers per operation
MOST = 5  # operations per view
_LEVELS, _DEVIATION = 10.0, 0.5
_FILL = (124, 116, 104)  # ImageNet's mean colour, for the gap that a moved image leaves
_LUMA = (0.299, 0.587, 0.114)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's filter SMOOTH
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Operation:
    """An operation of strength ``slope * l + offset``: rounded down if ``whole``, negative half the time if signed."""

    name: str
    apply: Callable[[Any, _Context], Any]
    slope: float = 0.0
    offset: float = 0.0
    whole: bool = False
    signed: bool = False


@dataclass(frozen=True)
class _Context:
    """The inputs of a branch of the graph besides the pixels."""

    amount: Any  # node, float32 []
    matrix: Any  # node, float32 [2, 3]
    height: int
    width: int
    channels: int


def draw(count: int, magnitude: float, u: Floats) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return number and strength, [B, MOST] each, of ``count`` operations.

    ``u`` [COUNTERS * count, B] are uniform numbers. Number k is ``OPERATIONS[k - 1]``, and 0 is none. The strength is
    the operation's argument in PIL's and timm's units: degrees, bits to keep, threshold, increment, factor, shear, or
    fraction of the side.
    """
    numbers, strengths = np.zeros((2, u.shape[1], MOST))
    parts = u[: COUNTERS * count].reshape(count, COUNTERS, u.shape[1])
    for k, (which, applied, sign, radius, angle) in enumerate(parts):
        number = np.floor(which * len(_TABLE)).astype(np.int64)
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller 1958
        level = np.clip(magnitude + _DEVIATION * normal, 0, _LEVELS) / _LEVELS
        strength = _column("slope")[number] * level + _column("offset")[number]
        strength = np.where(_column("whole")[number], np.floor(strength), strength)
        strength = np.where(_column("signed")[number] & (sign < 0.5), -strength, strength)
        numbers[:, k] = np.where(applied < 0.5, number + 1, 0)
        strengths[:, k] = np.where(applied < 0.5, strength, 0)
    return numbers.astype(np.int32), strengths.astype(np.float32)


def names(count: int) -> list[str]:
    """Return the names of the graph's arguments for ``count`` operations."""
    return [f"{name}{k}" for k in range(count) for name in ("branch", "amount", "matrix")]


def array(
    name: str,
    operation: NDArray[np.int32],
    strength: NDArray[np.float32],
    flip: NDArray[np.bool_],
    height: int,
    width: int,
) -> NDArray[Any]:
    """Return one argument [B, ...] of the graph for a view of ``height`` x ``width`` pixels.

    ``operation`` and ``strength`` [B, MOST] come from :func:`draw`. RandAugment is defined on flipped images, but the
    graph flips last. So the movement of the images in ``flip`` is mirrored.
    """
    kind, k = name[:-1], int(name[-1])
    number, value = operation[:, k], strength[:, k]
    if kind == "branch":
        return _BRANCH[number]
    if kind == "amount":  # Posterize gets the mask of the bits to keep
        bits = number == _number("Posterize")
        return np.where(bits, 256 - 2 ** (8 - np.where(bits, value, 8)), value).astype(np.float32)
    return _matrix(number, value.astype(np.float64), flip, height, width)


def graph(x: Any, nodes: dict[str, Any], count: int, height: int, width: int, channels: int) -> Any:
    """Apply ``count`` operations to 8-bit pixels [height, width, C], in a pipeline with conditionals."""
    for k in range(count):
        branch = nodes[f"branch{k}"]
        context = _Context(nodes[f"amount{k}"], nodes[f"matrix{k}"], height, width, channels)
        if branch != 0:
            x = _choose(branch, 1, len(_APPLY), x, context)
    return x


def _choose(branch: Any, low: int, high: int, x: Any, context: _Context) -> Any:
    """Send every image into its branch. DALI turns an ``if`` on a node into a split and a merge of the batch."""
    if low == high:
        return _APPLY[low - 1](x, context)
    middle = (low + high) // 2
    if branch <= middle:  # noqa: SIM108 - DALI needs the statement
        x = _choose(branch, low, middle, x, context)
    else:
        x = _choose(branch, middle + 1, high, x, context)
    return x


def _matrix(
    number: NDArray[np.int32], strength: Floats, flip: NDArray[np.bool_], height: int, width: int
) -> NDArray[np.float32]:
    """Return the affine map [B, 2, 3] from (x, y, 1) in the result to (x, y) in the image. Corners are whole."""
    rotate, shear_x, shear_y, shift_x, shift_y = (
        np.where(number == _number(name), strength, 0)
        for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
    )
    cosine, sine = np.cos(np.radians(rotate)), np.sin(np.radians(rotate))
    a, b = cosine, shear_x - sine
    d, e = shear_y + sine, cosine
    # rotated about the middle, sheared about the corner
    c = width / 2 * (1 - cosine + sine * (height / width)) + width * shift_x
    f = height / 2 * (1 - cosine - sine * (width / height)) + height * shift_y
    # Mirroring maps x to width - x before and after.
    c, f = np.where(flip, width * (1 - a) - c, c), np.where(flip, f + width * d, f)
    b, d = np.where(flip, -b, b), np.where(flip, -d, d)
    return np.stack([a, b, c, d, e, f], -1).reshape(-1, 2, 3).astype(np.float32)


def _move(x: Any, context: _Context) -> Any:
    """Move the image by its matrix, with linear interpolation.

    Gaps get the mean colour. The image's edges are not blended with it.
    """
    from nvidia.dali import fn, types

    fill = np.array(_FILL if context.channels == 3 else [round(np.dot(_FILL, _LUMA))], np.uint8)
    ones = types.Constant(255, dtype=types.UINT8)
    moved = fn.warp_affine(x, matrix=context.matrix)
    inside = fn.warp_affine(x | ones, matrix=context.matrix, interp_type=types.INTERP_NN, fill_value=0)
    return (moved & inside) | (types.Constant(fill, device=x.device) & (inside ^ ones))


def _solarize(x: Any, context: _Context) -> Any:
    """Invert the values from a threshold up. For eight bits, x ^ 255 is 255 - x."""
    from nvidia.dali import types

    return x ^ ((x >= to_device_of(x, context.amount)) * types.Constant(255, dtype=types.UINT8))


def _solarize_add(x: Any, context: _Context) -> Any:
    """Add to the values below 128. The sum stays below 256, because at most 128 is added."""
    from nvidia.dali import fn, types

    below = x < types.Constant(128, dtype=types.UINT8)
    return x + below * to_device_of(x, fn.cast(context.amount, dtype=types.UINT8))


def _posterize(x: Any, context: _Context) -> Any:
    from nvidia.dali import fn, types

    return x & to_device_of(x, fn.cast(context.amount, dtype=types.UINT8))


def _brightness(x: Any, context: _Context) -> Any:
    return floor(x * to_device_of(x, context.amount))


def _color(x: Any, context: _Context) -> Any:
    if context.channels != 3:  # only RGB has saturation
        return x
    return _blend(_grey(x, context.channels), x, to_device_of(x, context.amount))


def _contrast(x: Any, context: _Context) -> Any:
    from nvidia.dali import fn, math

    grey = _grey(x, context.channels)
    middle = math.floor(fn.reductions.mean(grey, axis_names="HW", keep_dims=True) + 0.5)
    return _blend(middle, x, to_device_of(x, context.amount))


def _sharpness(x: Any, context: _Context) -> Any:
    """Blend with the smoothed image. The outermost pixels have no smooth value and stay unchanged."""
    from nvidia.dali import fn, types

    inner = np.zeros((context.height, context.width, 1), np.float32)
    inner[1:-1, 1:-1] = 1
    smooth = fn.filter(x, types.Constant(_SMOOTH, device=x.device))
    factor = types.Constant(inner, device=x.device) * (to_device_of(x, context.amount) - 1.0) + 1.0
    return _blend(smooth, x, factor)


def _auto_contrast(x: Any, context: _Context) -> Any:
    """Stretch each channel to 0..255. A channel of one value stays unchanged."""
    from nvidia.dali import fn, math, types

    low = fn.reductions.min(x, axis_names="HW", keep_dims=True)
    span = fn.reductions.max(x, axis_names="HW", keep_dims=True) - low
    stretched = (x - low) * types.Constant(255, dtype=types.INT32) // math.max(span, 1)
    return fn.cast(stretched + low * (span == 0), dtype=types.UINT8)


def _equalize(x: Any, context: _Context) -> Any:
    """Map each value to the fraction of pixels below it, like PIL. DALI's operator also counts the value's own pixels.

    For the inverted image, DALI's fraction is one minus PIL's. PIL divides by a whole number of pixels per level, which
    is 1 % off at 224 pixels, and more for smaller views.
    """
    from nvidia.dali import fn, types

    ones = types.Constant(255, dtype=types.UINT8)
    return fn.equalize(x ^ ones) ^ ones


def _grey(x: Any, channels: int) -> Any:
    """Return luma [H, W, 1] in 8 bits. Without RGB, each channel is its own grey."""
    from nvidia.dali import fn, types

    return x if channels != 3 else fn.coord_transform(x, M=_LUMA, dtype=types.UINT8)


def _blend(base: Any, x: Any, factor: Any) -> Any:
    """Blend like PIL: base + factor * (x - base)."""
    from nvidia.dali import fn, types

    base = fn.cast(base, dtype=types.FLOAT)
    return floor(base + factor * (x - base))


def floor(values: Any) -> Any:
    """Convert to 8 bits like PIL: drop the fractions and clip to 0..255."""
    from nvidia.dali import fn, math, types

    return fn.cast(math.floor(values), dtype=types.UINT8)


def to_device_of(x: Any, scalar: Any) -> Any:
    """Move a scalar to the device of the pixels."""
    return scalar.gpu() if x.device == "gpu" else scalar


_TABLE = (  # timm's order and strengths
    _Operation("AutoContrast", _auto_contrast),
    _Operation("Equalize", _equalize),
    _Operation("Invert", _solarize),  # from 0 up
    _Operation("Rotate", _move, slope=30, signed=True),
    _Operation("Posterize", _posterize, slope=4, whole=True),
    _Operation("Solarize", _solarize, slope=256, whole=True),
    _Operation("SolarizeAdd", _solarize_add, slope=110, whole=True),
    _Operation("Color", _color, slope=1.8, offset=0.1),
    _Operation("Contrast", _contrast, slope=1.8, offset=0.1),
    _Operation("Brightness", _brightness, slope=1.8, offset=0.1),
    _Operation("Sharpness", _sharpness, slope=1.8, offset=0.1),
    _Operation("ShearX", _move, slope=0.3, signed=True),
    _Operation("ShearY", _move, slope=0.3, signed=True),
    _Operation("TranslateX", _move, slope=0.45, signed=True),
    _Operation("TranslateY", _move, slope=0.45, signed=True),
)
OPERATIONS = tuple(operation.name for operation in _TABLE)
_APPLY = tuple(dict.fromkeys(operation.apply for operation in _TABLE))  # the branches, from number 1
_BRANCH = np.array([0, *(1 + _APPLY.index(operation.apply) for operation in _TABLE)], np.int32)  # [1 + operations]


def _number(name: str) -> int:
    return 1 + OPERATIONS.index(name)


def _column(field: str) -> NDArray[Any]:
    return np.array([getattr(operation, field) for operation in _TABLE])
