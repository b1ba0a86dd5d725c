"""Launch the Triton kernel. For the current device see similarity/launch.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..similarity.launch import adjacent, capability, kernel_options, on_device, sizes, spans_of
from ..similarity.tiles import attention_tile
from .cpu import Terms
from .triton import sigmoid_kernel


def terms(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, first: int, need_x: bool, need_y: bool) -> Terms:
    """Like :func:`cpu.terms`: one pass goes over the rows. A second one over the columns gives the gradient of y."""
    x, y = adjacent(x), adjacent(y)
    loss, total, of_x = _pass(x, y, scale, bias, first, sums=True, gradient=need_x)
    of_y = _pass(y, x, scale, bias, -first, sums=False, gradient=True)[2] if need_y else of_x.new_empty(0)
    return loss.sum(), total.sum(), of_x, of_y


def _pass(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, first: int, *, sums: bool, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, m, dim = len(x), len(y), x.shape[1]
    tile = attention_tile(dim, x.dtype, capability(x))
    outs = triton.cdiv(dim, tile.block_out) if gradient else 1
    blocks, span, slots = spans_of(x, m, tile, outs)
    loss, total = (x.new_empty(slots, n if sums else 0, dtype=torch.float32) for _ in range(2))
    out = x.new_empty((slots, n, dim) if gradient else 0, dtype=torch.float32)
    boost = 2.0**14 if x.dtype == torch.float16 else 1.0  # fp16 has few digits for a sigmoid of 1e-5
    with on_device(x):
        sigmoid_kernel[(blocks, slots, outs)](
            x, y, scale, bias, loss, total, out, n, m, x.stride(0), y.stride(0), first, span, boost,
            **sizes(x, tile), BLOCK_OUT=tile.block_out, SUMS=sums, GRADIENT=gradient, **kernel_options(tile),
        )  # fmt: skip
    return loss, total, out.sum(0).div_(boost) if gradient else out
