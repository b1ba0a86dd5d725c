"""The colour spaces of views, and the numbers that define them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

ColorSpace = Literal["rgb", "lab", "ycbcr"]
"""The colour space into which 8-bit sRGB pixels are converted.

- "rgb": unchanged.
- "lab": CIE Lab for D65 and the 2 degree observer, like skimage's ``rgb2lab``. L is in 0..100, a and b are around 0.
- "ycbcr": 8-bit ITU-R BT.601 over the full range, like PIL's ``convert("YCbCr")``. One pixel in 50 differs by a level.
"""
COLOR_SPACES: tuple[str, ...] = get_args(ColorSpace)
Floats = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = np.array([0.95047, 1.0, 1.08883])  # XYZ of D65, 2 degree observer
RELATIVE_XYZ: Floats = (_XYZ / _WHITE[:, None]).astype(np.float32)
"""Matrix from linear sRGB to CIE XYZ relative to white (IEC 61966-2-1)."""
KNEE, SLOPE, INTERCEPT = 0.008856, 7.787, 16 / 116
"""Lab's f(t) is the cube root of t above the knee, and SLOPE t + INTERCEPT below."""
YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
"""BT.601 as in JFIF."""
_CUT = 1 / 64  # PIL sums in sixty-fourths, then drops the fraction
YCBCR_OFFSET = np.array([_CUT, 128 + _CUT, 128 + _CUT], np.float32)
"""Added before the fraction is dropped."""


def normalisation(color_space: ColorSpace, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Return the factor and summand [C] that map values of the colour space to (value - mean) / std.

    ``mean`` and ``std`` refer to 8-bit values scaled to [0, 1]. For "lab" they are in Lab's own units.
    """
    unit = 1.0 if color_space == "lab" else 255.0
    spread = np.array(std, np.float64)
    return (1 / (unit * spread)).astype(np.float32), (-np.array(mean, np.float64) / spread).astype(np.float32)


def luma(channels: int) -> Floats:
    """Return the weights of the channels in a pixel's grey: BT.601's weights for RGB, or 1 for a single channel."""
    return _LUMA if channels == 3 else np.ones(1, np.float32)


def linear_light() -> Floats:
    """Return the light in [0, 1] of each 8-bit sRGB value, [256] (IEC 61966-2-1)."""
    v = np.arange(256) / 255
    return np.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92).astype(np.float32)
