"""Launch the Triton kernels. For the current device see similarity/launch.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..similarity.launch import capability, kernel_options, on_device, sizes
from ..similarity.tiles import Tile, attention_tile
from .cpu import coefficients_of
from .triton import gradient_kernel, sums_kernel


def sums(z: Tensor, slices: Tensor, knots: int, limit: float) -> Tensor:
    """Like :func:`cpu.sums`."""
    z, directions = _alike(z, slices)
    views, n, _ = z.shape
    tile, m = _tile(z), len(directions)
    grid = (triton.cdiv(n, tile.block_m), triton.cdiv(m, tile.block_n), views)
    parts = z.new_empty(grid[0], views, 2, knots - 1, m, dtype=torch.float32)
    with on_device(z):
        sums_kernel[grid](
            z, directions, parts, n, m, z.stride(0), z.stride(1), directions.stride(0), limit / (knots - 1),
            KNOTS=knots, **sizes(z, tile), **kernel_options(tile),
        )  # fmt: skip
    return parts.sum(0)


def gradient(z: Tensor, slices: Tensor, of_sums: Tensor, limit: float) -> Tensor:
    """Like :func:`cpu.gradient`."""
    z, directions = _alike(z, slices)
    views, n, dim = z.shape
    knots = of_sums.shape[2] + 1
    tile = _tile(z)
    coefficients = coefficients_of(of_sums).contiguous()
    dz = z.new_empty(z.shape, dtype=torch.float32)
    with on_device(z):
        gradient_kernel[triton.cdiv(n, tile.block_m), triton.cdiv(dim, tile.block_out), views](
            z, directions, coefficients, dz, n, len(directions), z.stride(0), z.stride(1), directions.stride(0),
            limit / (knots - 1), KNOTS=knots, **sizes(z, tile), BLOCK_OUT=tile.block_out, **kernel_options(tile),
        )  # fmt: skip
    return dz


def _alike(z: Tensor, slices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and the directions [S, D], with adjacent features and of one type.

    fp32 unless both are bf16: gradients of an angle are below fp16's smallest number.
    """
    dtype = torch.bfloat16 if z.dtype == slices.dtype == torch.bfloat16 else torch.float32
    return z.to(dtype).contiguous(), slices.T.to(dtype).contiguous()


def _tile(z: Tensor) -> Tile:
    return attention_tile(z.shape[2], z.dtype, capability(z))
