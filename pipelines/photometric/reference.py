"""The definition of the photometric pass in plain torch, one image at a time; see ``draws.Draws`` for the symbols."""

from __future__ import annotations

import torch
from torch import Tensor

from ..color import INTERCEPT, KNEE, RELATIVE_XYZ, SLOPE, YCBCR, YCBCR_OFFSET, linear_light, luma
from .draws import Draws, Look, radius


def finish(pixels: Tensor, draws: Draws, look: Look) -> Tensor:
    """Views [B, S, S, C] in fp64 from 8-bit ones [B, S, S, C]; after each of the steps values are 8 bits again."""
    views = []
    for i, image in enumerate(pixels.double()):
        x = image
        if draws.matrix is not None and draws.mean_share is not None:
            grey = (x @ torch.from_numpy(luma(x.shape[-1])).double()).mean()
            x = _bits(x @ torch.from_numpy(draws.matrix[i]).double().T + float(draws.mean_share[i]) * grey)
        reach = int(radius(draws.sigma[i]))
        if reach:
            for _ in range(2):  # down the columns, then along the rows
                x = _bits(_blur(x, float(draws.sigma[i]), reach)).transpose(0, 1)
        if draws.solarize[i]:
            x = torch.minimum(x, 255 - x)
        x = _convert(x, look) * torch.from_numpy(look.scale) + torch.from_numpy(look.shift)
        views.append(x.flip(1) if draws.flip[i] else x)
    return torch.stack(views)


def weights(sigma: float, reach: int) -> Tensor:
    """Gaussian of a window of 2 reach + 1 pixels, fp64, with sum 1."""
    w = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    return w / w.sum()


def mirrored(size: int, reach: int) -> Tensor:
    """Pixel numbers [size + 2 reach] of a line continued by its reflection, without the edge, as often as needed."""
    at = torch.arange(-reach, size + reach).abs() % max(1, 2 * size - 2)
    return torch.minimum(at, (2 * size - 2 - at).abs())


def _blur(x: Tensor, sigma: float, reach: int) -> Tensor:
    windows = x[mirrored(len(x), reach)].unfold(0, 2 * reach + 1, 1)
    return windows @ weights(sigma, reach)


def _bits(x: Tensor) -> Tensor:
    """To the nearest of 0..255."""
    return (x + 0.5).floor().clamp(0, 255)


def _convert(x: Tensor, look: Look) -> Tensor:
    if look.color_space == "ycbcr":
        return (x @ torch.from_numpy(YCBCR).double().T + torch.from_numpy(YCBCR_OFFSET)).floor().clamp(0, 255)
    if look.color_space == "lab":
        t = torch.from_numpy(linear_light())[x.long()].double() @ torch.from_numpy(RELATIVE_XYZ).double().T
        fx, fy, fz = torch.where(t > KNEE, t.pow(1 / 3), SLOPE * t + INTERCEPT).unbind(-1)
        return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], -1)
    return x
