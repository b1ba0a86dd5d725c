"""The definition of the photometric pass in plain torch, one image at a time. ``draws.Draws`` defines the symbols."""

from __future__ import annotations

import torch
from torch import Tensor

from ..views.color import INTERCEPT, KNEE, RELATIVE_XYZ, SLOPE, YCBCR, YCBCR_OFFSET, linear_light, luma
from .draws import Draws, Look, radius


def finish(pixels: Tensor, draws: Draws, look: Look) -> Tensor:
    """Return views [B, H, W, C] in fp64 from 8-bit pixels [B, H, W, C]. Each step rounds to 8 bits again."""
    views = []
    for i, image in enumerate(pixels.double()):
        x = _bits(turn(image, float(draws.hue[i]))) if draws.hue[i] else image
        if draws.matrix is not None and draws.mean_share is not None:
            matrix = torch.from_numpy(draws.matrix[i]).double()
            if x.shape[-1] == 3:
                grey = (x @ torch.from_numpy(luma(3)).double()).mean()
                x = _bits(x @ matrix.T + float(draws.mean_share[i]) * grey)
            else:  # each channel is its own grey
                x = _bits(x * matrix + float(draws.mean_share[i]) * x.mean((0, 1)))
        reach = int(radius(draws.sigma[i]))
        if reach:
            for _ in range(2):  # down the columns, then along the rows
                x = _bits(_blur(x, float(draws.sigma[i]), reach)).transpose(0, 1)
        if draws.solarize[i]:
            x = torch.minimum(x, 255 - x)
        x = _convert(x, look) * torch.from_numpy(look.scale) + torch.from_numpy(look.shift)
        views.append(x.flip(1) if draws.flip[i] else x)
    return torch.stack(views)


def turn(x: Tensor, hue: float) -> Tensor:
    """Turn the hue of pixels [..., 3] in HSV by ``hue`` turns, like torchvision's ``adjust_hue`` (Smith 1978).

    HSV's hues form a hexagon with sides of length C = max - min. Red, green and blue are at 0, 2 C and 4 C of its
    perimeter. A channel is max up to a distance of C from its colour and min from 2 C on, and linear in between. The
    distance of a pixel from red is r + |g - b| + 2 min(r, C - |g - b|) with r = max - red. It needs no cases and no
    division.
    """
    high, chroma = x.amax(-1), x.amax(-1) - x.amin(-1)
    apart, below = x[..., 1] - x[..., 2], high - x[..., 0]
    distance = below + apart.abs() + 2 * torch.minimum(below, chroma - apart.abs())
    at = torch.where(apart < 0, -distance, distance) + 6 * hue * chroma
    channels = []
    for color in (0, 2, 4):
        way = (at - color * chroma).abs()
        way = torch.minimum(way, (6 * chroma - way).abs())
        channels.append(high - torch.minimum((way - chroma).clamp_min(0), chroma))
    return torch.stack(channels, -1)


def weights(sigma: float, reach: int) -> Tensor:
    """Return a Gaussian over a window of 2 reach + 1 pixels, fp64, with sum 1."""
    w = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    return w / w.sum()


def mirrored(size: int, reach: int) -> Tensor:
    """Return the pixel numbers [size + 2 reach] of a line, reflected at both ends without repeating them."""
    at = torch.arange(-reach, size + reach).abs() % max(1, 2 * size - 2)
    return torch.minimum(at, (2 * size - 2 - at).abs())


def _blur(x: Tensor, sigma: float, reach: int) -> Tensor:
    windows = x[mirrored(len(x), reach)].unfold(0, 2 * reach + 1, 1)
    return windows @ weights(sigma, reach)


def _bits(x: Tensor) -> Tensor:
    """Round to the nearest of 0..255."""
    return (x + 0.5).floor().clamp(0, 255)


def _convert(x: Tensor, look: Look) -> Tensor:
    if look.color_space == "ycbcr":
        return (x @ torch.from_numpy(YCBCR).double().T + torch.from_numpy(YCBCR_OFFSET)).floor().clamp(0, 255)
    if look.color_space == "lab":
        t = torch.from_numpy(linear_light())[x.long()].double() @ torch.from_numpy(RELATIVE_XYZ).double().T
        fx, fy, fz = torch.where(t > KNEE, t.pow(1 / 3), SLOPE * t + INTERCEPT).unbind(-1)
        return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], -1)
    return x
