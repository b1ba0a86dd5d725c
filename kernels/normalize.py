"""Normalisation of rows to unit norm, with a gradient of four operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORTEST = 1e-12


def normalize_rows(x: Tensor) -> Tensor:
    """Return ``z = x / max(|x|, 1e-12)`` along the last dimension.

    Its gradient is ``(g - z <z, g>) / max(|x|, 1e-12)``; there are first derivatives only. The result equals
    ``torch.nn.functional.normalize`` to the last bit. For nonzero rows shorter than 1e-12 the gradient differs: torch
    keeps its part along z.
    """
    rows: Tensor = _NormalizeRows.apply(x)
    return rows


class _NormalizeRows(torch.autograd.Function):
    """torch differentiates norm, clamp and quotient one by one: 16 operators, and it saves x as well as z."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(_SHORTEST)
        z: Tensor = x / length
        ctx.save_for_backward(z, length)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        z, length = ctx.saved_tensors
        along = (gradient * z).sum(-1, keepdim=True)
        across = torch.addcmul(gradient, z, along, value=-1)
        return across.div_(length)
