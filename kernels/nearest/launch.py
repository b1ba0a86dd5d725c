"""Launch the Triton kernel. For the current device see similarity/launch.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..similarity.launch import adjacent, capability, kernel_options, on_device, sizes, spans_of
from ..similarity.tiles import forward_tile
from .triton import nearest_kernel


def nearest(x: Tensor, y: Tensor | None, excluded: int | None) -> Tensor:
    """Like :func:`cpu.nearest`."""
    x = adjacent(x)
    y = x if y is None else adjacent(y)
    n, m = len(x), len(y)
    tile = forward_tile(x.shape[1], x.dtype, capability(x), columns=True)  # an index per score needs registers, too
    blocks, span, slots = spans_of(x, m, tile)
    top, place = x.new_empty(slots, n, dtype=torch.float32), x.new_empty(slots, n, dtype=torch.int32)
    with on_device(x):
        nearest_kernel[(blocks, slots)](
            x, y, top, place, n, m, x.stride(0), y.stride(0), excluded or 0, span,
            **sizes(x, tile), EXCLUDE=excluded is not None, **kernel_options(tile),
        )  # fmt: skip
    return place.gather(0, top.argmax(0, keepdim=True))[0].long()
