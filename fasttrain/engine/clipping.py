"""Clipping of every parameter's own gradient, as DINO has it, whole or in shards (DeepSpeed clips the global norm)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..optim.layerwise import Layout, Piece
from .shards import Shards

_EPS = 1e-6  # DINO's


def clip_each_parameter(optimizer: torch.optim.Optimizer, limit: float, shards: Shards | None) -> None:
    """From now on, before every step, ``g <- g min(1, limit / (|g| + 1e-6))`` for the gradient g of each parameter.

    ``utils.clip_gradients`` of facebookresearch/dino. ``shards`` says which pieces of parameters the optimizer is
    handed, None that they are whole; squared norms of pieces are summed over the ranks, 8 bytes a parameter.

    In fp16 a fused optimizer is handed the gradients times torch's ``grad_scale`` and divides by it in its step: the
    limit is in the scale of what is handed over.
    """

    @torch.no_grad()
    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        pieces, numbers, count = _pieces(gradients, None if shards is None else shards.layouts)
        squares = torch.zeros(count, dtype=torch.float64, device=gradients[0].device)
        if pieces:
            norms = torch.stack(torch._foreach_norm(pieces)).double()
            squares.index_add_(0, torch.tensor(numbers, device=squares.device), norms.square())
        if shards is not None:
            shards.sum_over_ranks(squares)
        scale = getattr(optimizer, "grad_scale", None)
        scale = 1.0 if scale is None else scale.double()
        factors = (limit * scale / (squares.sqrt() + _EPS * scale)).clamp_(max=1).to(gradients[0].dtype).unbind()
        if pieces:
            torch._foreach_mul_(pieces, [factors[number] for number in numbers])

    optimizer.register_step_pre_hook(clip)


def _pieces(parameters: list[Tensor], layouts: Mapping[Tensor, Layout] | None) -> tuple[list[Tensor], list[int], int]:
    """Views of the gradients piece by piece, which parameter each belongs to, and how many parameters there are."""
    views, numbers, count = [], [], 0
    for parameter in parameters:
        assert parameter.grad is not None
        layout = [Piece(0, parameter.numel())] if layouts is None else layouts[parameter]
        for piece in layout:
            if piece.numel:
                views.append(parameter.grad.view(-1)[piece.start : piece.start + piece.numel])
                numbers.append(count)
            count += 1
    return views, numbers, count
