"""The squared norm of ``C = Z^T Y`` without a D x D matrix if there are fewer rows than features.

    |C|^2 = sum_ij (Z Z^T)_ij (Y Y^T)_ij                   two N x N Gram matrices instead of one D x D matrix
    d|C|^2/dZ = 2 (Y Y^T) Z = 2 Y C^T,    d|C|^2/dY = 2 (Z Z^T) Y = 2 Z C

The smaller side has at most N D numbers, so it is kept for the backward pass, and memory is O(N D). These are products
of matrices only. So the library's products serve every device, and there is no kernel of our own.

Across ranks, Gram matrices have this rank's rows and the rows of all ranks as columns, and C is a sum over ranks. Both
give the gradient of this rank's rows without a sum of N x D gradients, and take one message more for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import Backend, choose_backend
from ..checks import check_pair
from ..collectives import Group, all_reduce_mean, check_equal_batches, gather_rows, start_gather
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
        squares, diagonal = _Norms.apply(a, None if other is None else b, group).split([1, z.shape[-1]], dim=1)
        squares = squares.squeeze(1)
    return (squares, diagonal) if z.ndim == 3 else (squares[0], diagonal[0])


def _gather(x: Tensor, group: Group | None) -> Tensor:
    """Return the rows of all ranks [V, ranks * N, D]."""
    return x if group is None else gather_rows(x.transpose(0, 1), group).transpose(0, 1)


class _Norms(torch.autograd.Function):
    """The sums of squares and the diagonals [V, 1 + D] for z and y [V, N, D]; y is z if it is None."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor | None, group: Group | None) -> Tensor:
        rows = (z,) if y is None else (z, y)
        ctx.group = group
        ctx.gram = z.shape[1] * (1 if group is None else group.size()) <= z.shape[2]
        with torch.autocast(z.device.type, enabled=False):
            if ctx.gram:
                columns = _columns(rows, group)
                grams = [x @ c.mT for x, c in zip(rows, columns, strict=True)]
                ctx.save_for_backward(*rows, *columns, *grams)
                return _sum(_joined((grams[0] * grams[-1]).sum((1, 2)), (z * rows[-1]).sum(1)), group)
            c = _sum(z.mT @ rows[-1], group)
            ctx.save_for_backward(*rows, c)
            return _joined(c.square().sum((1, 2)), c.diagonal(dim1=1, dim2=2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad = _sum(grad, ctx.group)
        of_squares, of_diagonal = 2 * grad[:, :1, None], grad[:, None, 1:]
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.gram:
                count = len(ctx.saved_tensors) // 3
                rows, columns, grams = (ctx.saved_tensors[k * count : (k + 1) * count] for k in range(3))
                z, y = rows[0], rows[-1]
                dz = of_squares * (grams[-1] @ columns[0]) + of_diagonal * y
                if count == 1:
                    return 2 * dz, None, None
                return dz, of_squares * (grams[0] @ columns[1]) + of_diagonal * z, None
            *rows, c = ctx.saved_tensors
            z, y = rows[0], rows[-1]
            dz = of_squares * (y @ c.mT) + of_diagonal * y
            if len(rows) == 1:
                return 2 * dz, None, None
            return dz, of_squares * (z @ c) + of_diagonal * z, None


def _joined(squares: Tensor, diagonal: Tensor) -> Tensor:
    return torch.cat([squares[:, None], diagonal], dim=1)


def _sum(x: Tensor, group: Group | None) -> Tensor:
    """Return the sum over the ranks, without autograd."""
    return x if group is None else all_reduce_mean(x, group) * group.size()


def _columns(rows: Sequence[Tensor], group: Group | None) -> Sequence[Tensor]:
    """Return every tensor's rows of all ranks [V, ranks * N, D] by one message, without autograd."""
    if group is None:
        return rows
    return start_gather(torch.cat(list(rows))[None], group)().transpose(0, 1).flatten(1, 2).chunk(len(rows))
