"""The squared difference of two Gram matrices, without storing them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import at_least_single

Negatives = Literal["keep", "zero", "zero_with_target"]
_MOST_ELEMENTS = 1 << 22
"""Elements of a part of a Gram matrix. With the target's and the difference it takes 48 MiB in fp32."""


class _GramError(torch.autograd.Function):
    """The error's gradient is computed with the error, while a part of the matrices is there. Backward scales it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, negatives: Negatives) -> Tensor:
        groups, rows, _ = x.shape
        together = max(_MOST_ELEMENTS // rows**2, 1)  # images whose whole matrices fit
        part = rows if together > 1 else max(_MOST_ELEMENTS // rows, 1)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        error = x.new_zeros(())
        for image in range(0, groups, together):
            keys, target_keys = x[image : image + together], target[image : image + together]
            for row in range(0, rows, part):
                here = slice(row, row + part)
                similarity, target_part = keys[:, here] @ keys.mT, target_keys[:, here] @ target_keys.mT
                if negatives == "zero":
                    similarity.clamp_(min=0)
                elif negatives == "zero_with_target":
                    similarity.masked_fill_((similarity < 0) & (target_part < 0), 0)
                kept = None if negatives == "keep" else similarity != 0
                if negatives != "keep":
                    target_part.clamp_(min=0)
                difference = similarity.sub_(target_part)
                error += difference.square().sum()
                if gradient is not None:
                    if kept is not None:
                        difference.mul_(kept)
                    # The matrix is symmetric, so a row of x has the same gradient as a query and as a key.
                    gradient[image : image + together, here] = difference @ keys
        count = groups * rows * rows
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(4 / count))
        return error / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None


def gram_error(x: Tensor, target: Tensor, *, negatives: Negatives = "keep") -> Tensor:
    """Return the mean squared difference of the Gram matrices of x [G, N, D] and target [G, N, E], a scalar.

        mean over g, i, j of (f(<x_gi, x_gj>) - f(<t_gi, t_gj>))^2

    f keeps negative products, sets them to 0 (``zero``), or sets the target's to 0, and x's where both are negative
    (``zero_with_target``). The target gets no gradient. Memory is O(G N D) and 48 MiB, not G N^2. Raise ValueError for
    other shapes.
    """
    if x.ndim != 3 or target.shape[:-1] != x.shape[:-1] or 0 in (*x.shape, *target.shape):
        raise ValueError(f"x and target must be [G, N, D] and [G, N, E], got {tuple(x.shape)}, {tuple(target.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        error: Tensor = _GramError.apply(at_least_single(x), at_least_single(target.detach()), negatives)
    return error
