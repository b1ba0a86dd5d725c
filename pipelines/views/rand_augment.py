"""RandAugment in timm's form, as InfoMin uses it: what is drawn for an image, and the part of the graph that does it.

Of 15 operations some are drawn with replacement, each is applied with probability 1/2, and its strength follows from
a level l = clip(normal(magnitude, 0.5), 0, 10) / 10 (timm's 'rand-n2-m10-mstd0.5'). In the graph, operations that are
alike share a branch; only the images for which a branch was drawn go through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COUNTERS = 5  # uniform numbers an operation takes
MOST = 5  # operations a view may have
_LEVELS, _DEVIATION = 10.0, 0.5
_FILL = (124, 116, 104)  # ImageNet's mean colour, where a moved image leaves a gap
_LUMA = (0.299, 0.587, 0.114)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's filter of that name
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Operation:
    """An operation with the strength ``slope * l + offset``, rounded down if ``whole``, negated for half if signed."""

    name: str
    apply: Callable[[Any, _Context], Any]
    slope: float = 0.0
    offset: float = 0.0
    whole: bool = False
    signed: bool = False


@dataclass(frozen=True)
class _Context:
    """What a branch of the graph may need besides the pixels."""

    amount: Any  # node, float32 []
    matrix: Any  # node, float32 [2, 3]
    size: int
    channels: int


def draw(count: int, magnitude: float, u: Floats) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Number and strength, [B, MOST] each, of ``count`` operations from uniform numbers ``u`` [COUNTERS * count, B].

    Number k is ``OPERATIONS[k - 1]``; 0 is none. The strength is the operation's argument in PIL's and timm's units:
    degrees, bits to keep, threshold, increment, factor, shear, or fraction of the side.
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
    """Arguments that the graph takes for ``count`` operations."""
    return [f"{name}{k}" for k in range(count) for name in ("branch", "amount", "matrix")]


def array(
    name: str,
    operation: NDArray[np.int32],
    strength: NDArray[np.float32],
    flip: NDArray[np.bool_],
    size: int,
) -> NDArray[Any]:
    """One argument [B, ...] of the graph from what was drawn, [B, MOST], for a view of ``size`` pixels.

    The graph flips last, the law says first: ``flip`` mirrors the movement of these images, so that it is the same.
    """
    kind, k = name[:-1], int(name[-1])
    number, drawn = operation[:, k], strength[:, k]
    if kind == "branch":
        return _BRANCH[number]
    if kind == "amount":  # for bits to keep: their mask
        bits = number == _number("Posterize")
        return np.where(bits, 256 - 2 ** (8 - np.where(bits, drawn, 8)), drawn).astype(np.float32)
    return _matrix(number, drawn.astype(np.float64), flip, size)


def graph(x: Any, given: dict[str, Any], count: int, size: int, channels: int) -> Any:
    """Apply ``count`` operations to 8-bit pixels [size, size, C]; needs a pipeline with conditionals."""
    for k in range(count):
        branch = given[f"branch{k}"]
        context = _Context(given[f"amount{k}"], given[f"matrix{k}"], size, channels)
        if branch != 0:
            x = _choose(branch, 1, len(_APPLY), x, context)
    return x


def _choose(branch: Any, low: int, high: int, x: Any, context: _Context) -> Any:
    """Send every image into its branch: DALI turns an ``if`` on a node into a split and a merge of the batch."""
    if low == high:
        return _APPLY[low - 1](x, context)
    middle = (low + high) // 2
    if branch <= middle:  # noqa: SIM108 - DALI knows this form
        x = _choose(branch, low, middle, x, context)
    else:
        x = _choose(branch, middle + 1, high, x, context)
    return x


def _matrix(number: NDArray[np.int32], drawn: Floats, flip: NDArray[np.bool_], size: int) -> NDArray[np.float32]:
    """Affine map [B, 2, 3] from pixels (x, y, 1) of the result to those of the image, corners at whole numbers."""
    rotate, shear_x, shear_y, shift_x, shift_y = (
        np.where(number == _number(name), drawn, 0)
        for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
    )
    cosine, sine, half = np.cos(np.radians(rotate)), np.sin(np.radians(rotate)), size / 2
    a, b = cosine, shear_x - sine
    d, e = shear_y + sine, cosine
    c = half * (1 - cosine + sine) + size * shift_x  # turned about the middle, sheared about the corner
    f = half * (1 - cosine - sine) + size * shift_y
    # Mirrored: x to size - x before and after.
    c, f = np.where(flip, size * (1 - a) - c, c), np.where(flip, f + size * d, f)
    b, d = np.where(flip, -b, b), np.where(flip, -d, d)
    return np.stack([a, b, c, d, e, f], -1).reshape(-1, 2, 3).astype(np.float32)


def _move(x: Any, context: _Context) -> Any:
    """Move the image by its matrix, interpolating linearly; gaps get the mean colour, edges are not blended with it."""
    from nvidia.dali import fn, types

    fill = np.array(_FILL if context.channels == 3 else [round(np.dot(_FILL, _LUMA))], np.uint8)
    ones = types.Constant(255, dtype=types.UINT8)
    moved = fn.warp_affine(x, matrix=context.matrix)
    inside = fn.warp_affine(x | ones, matrix=context.matrix, interp_type=types.INTERP_NN, fill_value=0)
    return (moved & inside) | (types.Constant(fill, device=x.device) & (inside ^ ones))


def _solarize(x: Any, context: _Context) -> Any:
    """Invert the values from a threshold up: x ^ 255 is 255 - x for eight bits."""
    from nvidia.dali import types

    return x ^ ((x >= beside(x, context.amount)) * types.Constant(255, dtype=types.UINT8))


def _solarize_add(x: Any, context: _Context) -> Any:
    """Add to the values below 128; the sum stays below 256, since at most 128 is added."""
    from nvidia.dali import fn, types

    below = x < types.Constant(128, dtype=types.UINT8)
    return x + below * beside(x, fn.cast(context.amount, dtype=types.UINT8))


def _posterize(x: Any, context: _Context) -> Any:
    from nvidia.dali import fn, types

    return x & beside(x, fn.cast(context.amount, dtype=types.UINT8))


def _brightness(x: Any, context: _Context) -> Any:
    return floor(x * beside(x, context.amount))


def _color(x: Any, context: _Context) -> Any:
    if context.channels == 1:
        return x
    return _blend(_grey(x, context.channels), x, beside(x, context.amount))


def _contrast(x: Any, context: _Context) -> Any:
    from nvidia.dali import fn, math

    grey = _grey(x, context.channels)
    middle = math.floor(fn.reductions.mean(grey, axis_names="HW", keep_dims=True) + 0.5)
    return _blend(middle, x, beside(x, context.amount))


def _sharpness(x: Any, context: _Context) -> Any:
    """Blend with the smoothed image; the outermost pixels have no smooth value and stay."""
    from nvidia.dali import fn, types

    inner = np.zeros((context.size, context.size, 1), np.float32)
    inner[1:-1, 1:-1] = 1
    smooth = fn.filter(x, types.Constant(_SMOOTH, device=x.device))
    factor = types.Constant(inner, device=x.device) * (beside(x, context.amount) - 1.0) + 1.0
    return _blend(smooth, x, factor)


def _auto_contrast(x: Any, context: _Context) -> Any:
    """Stretch each channel to 0..255; a channel of one value stays."""
    from nvidia.dali import fn, math, types

    low = fn.reductions.min(x, axis_names="HW", keep_dims=True)
    span = fn.reductions.max(x, axis_names="HW", keep_dims=True) - low
    stretched = (x - low) * types.Constant(255, dtype=types.INT32) // math.max(span, 1)
    return fn.cast(stretched + low * (span == 0), dtype=types.UINT8)


def _equalize(x: Any, context: _Context) -> Any:
    """Give each value the share of the pixels below it, as PIL does; DALI's counts the pixels of the value as well.

    Of the inverted image the latter is one minus the former. PIL divides by a whole number of pixels a level, which is
    1 % off at 224 pixels and more at few.
    """
    from nvidia.dali import fn, types

    ones = types.Constant(255, dtype=types.UINT8)
    return fn.equalize(x ^ ones) ^ ones


def _grey(x: Any, channels: int) -> Any:
    """Luma [H, W, 1] of 8 bits."""
    from nvidia.dali import fn, types

    return x if channels == 1 else fn.coord_transform(x, M=_LUMA, dtype=types.UINT8)


def _blend(base: Any, x: Any, factor: Any) -> Any:
    """PIL's blend, base + factor * (x - base)."""
    from nvidia.dali import fn, types

    base = fn.cast(base, dtype=types.FLOAT)
    return floor(base + factor * (x - base))


def floor(values: Any) -> Any:
    """Cut to 8 bits as PIL does: fractions off, and everything to 0..255."""
    from nvidia.dali import fn, math, types

    return fn.cast(math.floor(values), dtype=types.UINT8)


def beside(x: Any, scalar: Any) -> Any:
    """Bring a scalar to where the pixels are."""
    return scalar.gpu() if x.device == "gpu" else scalar


_TABLE = (  # in timm's order, with its strengths
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
