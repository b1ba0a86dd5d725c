"""Launch the Triton kernel. For the current device see similarity/launch.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..similarity.launch import adjacent, capability, kernel_options, on_device, splits
from ..similarity.tiles import forward_tile
from .triton import nearest_kernel


def nearest(x: Tensor, y: Tensor | None, excluded: int | None) -> Tensor:
    """Like :func:`cpu.nearest`."""
    x = adjacent(x)
    y = x if y is None else adjacent(y)
    n, m, dim = len(x), len(y), x.shape[1]
    tile = forward_tile(dim, x.dtype, capability(x), columns=True)  # an index per score needs registers, too
    row_tiles, col_tiles = triton.cdiv(n, tile.block_m), triton.cdiv(m, tile.block_n)
    span = triton.cdiv(col_tiles, splits(x, row_tiles, col_tiles))
    grid = (row_tiles, triton.cdiv(col_tiles, span))
    top, place = x.new_empty(grid[1], n, dtype=torch.float32), x.new_empty(grid[1], n, dtype=torch.int32)
    with on_device(x):
        nearest_kernel[grid](
            x, y, top, place, n, m, x.stride(0), y.stride(0), excluded or 0, span,
            D=dim, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, EXCLUDE=excluded is not None,
            **kernel_options(tile),
        )  # fmt: skip
    return place.gather(0, top.argmax(0, keepdim=True))[0].long()
