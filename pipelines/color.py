"""Per-pixel parts of the DALI graph: solarisation, and the colour spaces in which a network may see its views."""

from __future__ import annotations

from typing import Any, Literal, get_args

ColorSpace = Literal["rgb", "lab", "ycbcr"]
COLOR_SPACES: tuple[str, ...] = get_args(ColorSpace)

# Middle and half of the range that sRGB covers in Lab: with them, CMC's two networks see values in [-1, 1].
LAB_MEAN = (50.0, 6.025, -6.6895)
LAB_STD = (50.0, 92.208, 101.1675)

_XYZ = (  # linear sRGB to CIE XYZ (IEC 61966-2-1)
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)  # XYZ of D65, 2 degree observer
_KNEE, _SLOPE = 0.008856, 7.787  # below the knee, Lab's cube root is this straight line
_YCBCR = (0.299, 0.587, 0.114, -0.168736, -0.331264, 0.5, 0.5, -0.418688, -0.081312)  # JFIF's form of BT.601
_CUT = 1 / 64 - 1 / 2  # PIL cuts fractions off after sums in sixty-fourths, where the graph rounds to nearest


def unit(color_space: ColorSpace) -> float:
    """How much one of a recipe's ``mean`` and ``std`` is in the values of the graph: Lab is in its own units."""
    return 1.0 if color_space == "lab" else 255.0


def convert(x: Any, color_space: ColorSpace) -> Any:
    """Convert 8-bit sRGB pixels [H, W, 3].

    "lab": float32 CIE Lab for D65 and the 2 degree observer, as skimage's ``rgb2lab``: L in 0..100, a, b around 0.
    "ycbcr": 8-bit ITU-R BT.601 over the full range, as PIL's ``convert("YCbCr")``; 1 in 50 values differs, by 1.
    """
    from nvidia.dali import fn, types

    if color_space == "lab":
        return _lab(x)
    if color_space == "ycbcr":
        return fn.coord_transform(x, M=_YCBCR, T=(_CUT, 128 + _CUT, 128 + _CUT), dtype=types.UINT8)
    return x


def solarize(x: Any, threshold: Any) -> Any:
    """Invert the values from the image's threshold up: x ^ 255 is 255 - x for eight bits."""
    from nvidia.dali import types

    if x.device == "gpu":
        threshold = threshold.gpu()
    return x ^ ((x >= threshold) * types.Constant(255, dtype=types.UINT8))


def _lab(x: Any) -> Any:
    """L = 116 f(Y) - 16, a = 500 (f(X) - f(Y)), b = 200 (f(Y) - f(Z)) of XYZ relative to white."""
    from nvidia.dali import fn, math, types

    linear = fn.lookup_table(x, keys=list(range(256)), values=[_linear(k) for k in range(256)], dtype=types.FLOAT)
    t = fn.coord_transform(linear, M=[value / _WHITE[k] for k, row in enumerate(_XYZ) for value in row])
    # f(t) is the cube root above the knee and _SLOPE t + 16/116 below; one of these two terms is always constant.
    f = math.cbrt(math.max(t, _KNEE)) + _SLOPE * math.min(t, _KNEE)
    excess = 116 * _SLOPE * _KNEE  # that constant, which cancels in a and b
    from_f = (0.0, 116.0, 0.0, 500.0, -500.0, 0.0, 0.0, 200.0, -200.0)
    return fn.coord_transform(f, M=from_f, T=(-16 - excess, 0.0, 0.0))


def _linear(value: int) -> float:
    """Light in [0, 1] of an 8-bit sRGB value (IEC 61966-2-1)."""
    v = value / 255
    return float(((v + 0.055) / 1.055) ** 2.4) if v > 0.04045 else v / 12.92
