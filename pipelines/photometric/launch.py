"""Launch the Triton kernels of the photometric pass."""

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
    """Write the views of 8-bit ``pixels`` [B, H, W, C] to ``out`` of the same shape, in its floating-point type.

    The result equals ``reference.finish`` up to the rounding of fp32 sums. Both tensors are contiguous and on the GPU.
    """
    if pixels.shape[-1] not in (1, 3):
        _finish_channels(pixels, draws, look, out)
        return
    packed_draws = torch.from_numpy(packed(draws, pixels.shape[-1])).to(pixels.device, non_blocking=True)
    color, space = draws.matrix is not None, _SPACES[look.color_space]
    if draws.hue.any():
        pixels = _turned(pixels, packed_draws)
    if color:
        packed_draws[:, 3] *= _mean_grey(pixels)
    if not draws.sigma.any():
        _launch(pixels, packed_draws, out, look, COLOR=color, BLUR=False, DOWN=False, FINISH=True, SPACE=space)
        return
    halfway = torch.empty_like(pixels)
    _launch(pixels, packed_draws, halfway, look, COLOR=color, BLUR=True, DOWN=True, FINISH=False, SPACE=RGB)
    _launch(halfway, packed_draws, out, look, COLOR=False, BLUR=True, DOWN=False, FINISH=True, SPACE=space)


def _finish_channels(pixels: Tensor, draws: Draws, look: Look, out: Tensor) -> None:
    """Process the channels of images that are not RGB like grey images with the same steps, then normalise them."""
    count, height, width, channels = pixels.shape
    grey = pixels.permute(0, 3, 1, 2).reshape(count * channels, height, width, 1)
    values = torch.empty_like(grey, dtype=torch.float32)
    finish(grey, draws.per_channel(channels), Look.unchanged(), out=values)
    scale, shift = (torch.from_numpy(part).to(out.device) for part in (look.scale, look.shift))
    out.copy_(values.view(count, channels, height, width).permute(0, 2, 3, 1) * scale + shift)


def _turned(pixels: Tensor, packed_draws: Tensor) -> Tensor:
    turned = torch.empty_like(pixels)
    count, height, width, _ = pixels.shape
    grid = (triton.cdiv(height * width, BLOCK), count)
    turn_kernel[grid](pixels, packed_draws, turned, height, width, BLOCK=BLOCK, num_warps=WARPS)
    return turned


def packed(draws: Draws, channels: int) -> NDArray[np.float32]:
    """Return one row per image [B, 5 + C C]: solarised, flipped, sigma, share of the mean grey, hue, matrix by rows."""
    count = len(draws.flip)
    matrix = np.zeros((count, channels, channels), np.float32) if draws.matrix is None else draws.matrix
    share = np.zeros(count, np.float32) if draws.mean_share is None else draws.mean_share
    rest = np.stack([draws.solarize, draws.flip, draws.sigma, share, draws.hue], 1)
    return np.concatenate([rest, matrix.reshape(count, -1)], 1).astype(np.float32)


def _mean_grey(pixels: Tensor) -> Tensor:
    """Return the mean luma [B]. The sums are of whole numbers, so their order does not matter."""
    means = pixels.sum((1, 2)).float() / (pixels.shape[1] * pixels.shape[2])
    weighted = [float(weight) * mean for weight, mean in zip(luma(pixels.shape[-1]), means.unbind(1), strict=True)]
    return torch.stack(weighted).sum(0)


def _launch(pixels: Tensor, packed_draws: Tensor, out: Tensor, look: Look, **switches: Any) -> None:
    count, height, width, channels = pixels.shape
    scale, shift = ([float(v) for v in np.resize(values, 3)] for values in (look.scale, look.shift))
    grid = (triton.cdiv(height * width, BLOCK), count)
    finish_kernel[grid](
        pixels, packed_draws, out, height, width, *scale, *shift, C=channels, BLOCK=BLOCK, num_warps=WARPS, **switches
    )  # fmt: skip
