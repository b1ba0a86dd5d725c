"""The squared norm of ``C = Z^T Y`` without a D x D matrix if there are fewer rows than features.

    |C|^2 = sum_ij (Z Z^T)_ij (Y Y^T)_ij                   two N x N Gram matrices instead of one D x D matrix
    d|C|^2/dZ = 2 (Y Y^T) Z = 2 Y C^T,    d|C|^2/dY = 2 (Z Z^T) Y = 2 Z C

The smaller side has at most N D numbers, so it is kept for the backward pass, and memory is O(N D). These are products
of matrices only. So the library's products serve every device, and there is no kernel of our own.

Across ranks, Gram matrices have this rank's rows and the rows of all ranks as columns, and C is a sum over ranks. Both
give the gradient of this rank's rows without a sum of N x D gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, choose_backend
from ..checks import check_pair
from ..collectives import Group, all_reduce_mean, check_equal_batches, gather_rows, mean_over_ranks, start_gather
from ..precision import at_least_single
from . import reference


def covariance_norms(
    z: Tensor,
    other: Tensor | None = None,
    *,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return ``sum_jk C_jk^2`` and the diagonal [D] of ``C = sum_i z_i other_i^T``, for z and other [N, D].

    Without ``other`` it is z. C is neither centred nor divided: for a covariance, pass centred rows and divide by
    (N - 1)^2 and N - 1. Memory is O(N D), because the smaller of C [D, D] and the Gram matrices [N, N] is formed. Sums
    are at least fp32. Every backend but "eager" is the same on all devices.

    With ``group`` C is the sum over the rows of all ranks. The norms [V] and diagonals [V, D] of views [V, N, D] take
    no more messages than one. Raises ValueError if z and other are not floating point [N, D] of one shape and type.
    """
    rows = (z,) if other is None else (z, other)
    if check_batches:
        check_equal_batches("covariance_norms", group, *rows)
    views = [x if x.ndim == 3 else x[None] for x in rows]
    check_pair(views[0].flatten(0, 1), views[-1].flatten(0, 1), "z", "other", same_rows=True)
    a, b = (at_least_single(x) for x in (views[0], views[-1]))
    if choose_backend(backend, z) == "eager":
        squares, diagonal = reference.covariance_norms(*(_gather(x, group) for x in (a, b)))
    else:
        squares = _SquaredNorm.apply(a, None if other is None else b, group)
        diagonal = (a * b).sum(1)
        if group is not None:
            diagonal = mean_over_ranks(diagonal, group) * group.size()
    return (squares, diagonal) if z.ndim == 3 else (squares[0], diagonal[0])


def _gather(x: Tensor, group: Group | None) -> Tensor:
    """Return the rows of all ranks [V, ranks * N, D]."""
    return x if group is None else gather_rows(x.transpose(0, 1), group).transpose(0, 1)


class _SquaredNorm(torch.autograd.Function):
    """The sums of squares [V] for z and y [V, N, D]; y is z if it is None."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor | None, group: Group | None) -> Tensor:
        ctx.group = group
        ranks = 1 if group is None else group.size()
        ctx.gram = ranks * z.shape[1] <= z.shape[2]
        with torch.autocast(z.device.type, enabled=False):
            if ctx.gram:
                columns = [None if x is None else _columns(x, group) for x in (z, y)]
                grams = [None if x is None else x @ c.mT for x, c in zip((z, y), columns, strict=True)]
                ctx.save_for_backward(*columns, *grams)
                squares = (grams[0] * grams[0 if y is None else 1]).sum((1, 2))
                return squares if group is None else all_reduce_mean(squares, group) * ranks
            c = z.mT @ (z if y is None else y)
            c = c if group is None else all_reduce_mean(c, group) * ranks
            ctx.save_for_backward(z, y, c)
            return c.square().sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        group = ctx.group
        grad = grad if group is None else all_reduce_mean(grad, group) * group.size()
        grad = 2 * grad[:, None, None]
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.gram:
                all_z, all_y, of_z, of_y = ctx.saved_tensors
                if all_y is None:
                    return (2 * grad) * (of_z @ all_z), None, None
                return grad * (of_y @ all_z), grad * (of_z @ all_y), None
            z, y, c = ctx.saved_tensors
            if y is None:
                return (2 * grad) * (z @ c), None, None
            return grad * (y @ c.mT), grad * (z @ c), None


def _columns(x: Tensor, group: Group | None) -> Tensor:
    """Return the rows of all ranks [V, ranks * N, D], without autograd."""
    return x if group is None else start_gather(x[None], group)().transpose(0, 1).flatten(1, 2)
