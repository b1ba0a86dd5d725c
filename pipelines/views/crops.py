"""Crop and resize on the CPU: torch's 8-bit kernel, which is PIL's algorithm seven times faster than DALI's."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def crop(
    image: NDArray[np.uint8],
    start: NDArray[np.float32],
    end: NDArray[np.float32],
    size: int,
    interpolation: Literal["linear", "cubic"],
) -> NDArray[np.uint8]:
    """Pixels [size, size, C] of the box from ``start`` to ``end``, whole pixels as (y, x), of an image [H, W, C].

    Anti-aliased as PIL does it; without, users of DALI lost 1 to 1.5 % accuracy (DALI issues 1507, 2559). Nothing from
    outside the box comes in.
    """
    (top, left), (bottom, right) = start.astype(int).tolist(), end.astype(int).tolist()
    # Copied by NumPy, since torch would start threads of its own for it.
    box = torch.from_numpy(np.ascontiguousarray(image[top:bottom, left:right])).permute(2, 0, 1)[None]
    resized = F.interpolate(box, (size, size), mode=_MODES[interpolation], antialias=True)
    pixels: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return pixels
