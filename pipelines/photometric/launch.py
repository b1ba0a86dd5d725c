"""Starts the Triton kernels of the photometric pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from ..views.color import luma
from .draws import Draws, Look
from .triton import LAB, RGB, YCBCR, finish_kernel, turn_kernel

BLOCK, WARPS = 256, 4
_SPACES = {"rgb": RGB, "ycbcr": YCBCR, "lab": LAB}


def finish(pixels: Tensor, draws: Draws, look: Look, *, out: Tensor) -> None:
    """Write the views of 8-bit ``pixels`` [B, S, S, C] to ``out`` of the same shape, in its floating point type.

    As ``reference.finish`` but for the last bit: sums are fp32. Both tensors are contiguous and on the GPU.
    """
    given = torch.from_numpy(packed(draws, pixels.shape[-1])).to(pixels.device, non_blocking=True)
    color, space = draws.matrix is not None, _SPACES[look.color_space]
    if draws.hue.any():
        pixels = _turned(pixels, given)
    if color:
        given[:, 3] *= _mean_grey(pixels)
    if not draws.sigma.any():
        _launch(pixels, given, out, look, COLOR=color, BLUR=False, DOWN=False, FINISH=True, SPACE=space)
        return
    halfway = torch.empty_like(pixels)
    _launch(pixels, given, halfway, look, COLOR=color, BLUR=True, DOWN=True, FINISH=False, SPACE=RGB)
    _launch(halfway, given, out, look, COLOR=False, BLUR=True, DOWN=False, FINISH=True, SPACE=space)


def _turned(pixels: Tensor, given: Tensor) -> Tensor:
    turned = torch.empty_like(pixels)
    count, size = pixels.shape[:2]
    grid = (triton.cdiv(size * size, BLOCK), count)
    turn_kernel[grid](pixels, given, turned, size, BLOCK=BLOCK, num_warps=WARPS)
    return turned


def packed(draws: Draws, channels: int) -> NDArray[np.float32]:
    """One row an image [B, 5 + C C]: solarised, flipped, sigma, share of the mean grey, hue, matrix row by row."""
    count = len(draws.flip)
    matrix = np.zeros((count, channels, channels), np.float32) if draws.matrix is None else draws.matrix
    share = np.zeros(count, np.float32) if draws.mean_share is None else draws.mean_share
    rest = np.stack([draws.solarize, draws.flip, draws.sigma, share, draws.hue], 1)
    return np.concatenate([rest, matrix.reshape(count, -1)], 1).astype(np.float32)


def _mean_grey(pixels: Tensor) -> Tensor:
    """Mean luma [B]; sums of whole numbers, so that it is the same in any order."""
    means = pixels.sum((1, 2)).float() / (pixels.shape[1] * pixels.shape[2])
    weighted = [float(weight) * mean for weight, mean in zip(luma(pixels.shape[-1]), means.unbind(1), strict=True)]
    return torch.stack(weighted).sum(0)


def _launch(pixels: Tensor, given: Tensor, out: Tensor, look: Look, **switches: Any) -> None:
    count, size, _, channels = pixels.shape
    scale, shift = ([float(v) for v in np.resize(values, 3)] for values in (look.scale, look.shift))
    grid = (triton.cdiv(size * size, BLOCK), count)
    finish_kernel[grid](
        pixels, given, out, size, *scale, *shift, C=channels, BLOCK=BLOCK, num_warps=WARPS, **switches
    )  # fmt: skip
