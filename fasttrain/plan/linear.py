"""The linear layer that DeepSpeed puts in the place of torch's at ZeRO-3, for tensors without numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..engine.zero import linear_function, set_linear_function


@contextmanager
def linear_of_zero3() -> Iterator[None]:
    """Within, ``torch.nn.functional.linear`` is as at ZeRO-3, where DeepSpeed replaces it for good.

    (A ``TorchFunctionMode`` would be off where checkpointed blocks are recomputed.)
    """
    linear = linear_function()
    set_linear_function(_Linear.apply)
    try:
        yield
    finally:
        set_linear_function(linear)


class _Linear(torch.autograd.Function):
    """``x W^T + b``, which keeps parameters, not what autocast makes of them, and its input as it came, fp32 or not.

    As ``deepspeed.runtime.zero.linear.LinearFunctionForZeroStage3`` does (0.19.8).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if x.dim() == 2 and bias is not None:
            return torch.addmm(bias, x, weight.t())
        y = x.matmul(weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, bias = ctx.saved_tensors
        of_x, of_weight, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        with torch.autocast("cpu", ctx.low, enabled=ctx.low is not None):
            return (
                grad.matmul(weight) if of_x else None,
                rows.t().matmul(x.reshape(-1, x.shape[-1])) if of_weight else None,
                None if bias is None else rows.sum(0),
            )
