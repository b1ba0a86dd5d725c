"""Clipping of the whole gradient, and of each parameter's own gradient, as DINO does.

DeepSpeed clips the whole gradient only. At stages 1 to 3 fasttrain leaves that to DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..optim.layerwise import Layout, Piece
from .shards import Shards

_EPS = 1e-6  # DINO's


@torch.no_grad()
def clip_whole_gradient(gradients: list[Tensor], limit: float, norm: float | None, scale: float = 1.0) -> None:
    """Multiply gradients in place by ``min(1, limit / (norm + 1e-6))``, as torch's clip_grad_norm_ does.

    ``norm`` is the norm of the gradients divided by ``scale``, fp16's loss scale. It is computed if it is None.
    """
    if norm is None:
        norm = float(torch.stack(torch._foreach_norm(gradients)).double().norm()) / scale if gradients else 0.0
    factor = limit / (norm + _EPS)
    if factor < 1:
        torch._foreach_mul_(gradients, factor)


def clip_each_parameter(optimizer: torch.optim.Optimizer, limit: float, shards: Shards | None) -> None:
    """Make the optimizer clip each parameter's gradient g before every step: ``g <- g min(1, limit / (|g| + 1e-6))``.

    This is ``utils.clip_gradients`` of facebookresearch/dino. ``shards`` has the layouts of the optimizer's flat
    shards, or is None for whole parameters. The squared norms of pieces are summed over the ranks, 8 bytes per
    parameter.

    In fp16 a fused optimizer receives the gradients times torch's ``grad_scale`` and divides by it in its step. The
    limit is therefore multiplied by ``grad_scale``.
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
    """Return views of the gradients' pieces, the index of each piece's parameter, and the number of parameters."""
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
