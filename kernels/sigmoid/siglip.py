"""SigLIP's loss of all pairs, on every backend and across ranks (arXiv 2303.15343)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, choose_backend
from ..checks import check_finite, check_pair
from ..collectives import Group, check_equal_batches, first_row, gather_rows
from . import op, reference


def siglip(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> Tensor:
    """SigLIP's sigmoid loss of rows x and y [N, D], where y_i belongs to x_i (arXiv 2303.15343, section 3.2), in nats.

        l = -(1 / N) sum_ij log sigmoid(l_ij (scale <x_i, y_j> + bias)),     l_ij = 1 for i = j, else -1

    The scores are never stored: memory is O(N D). Sums are at least fp32. x, y, and a scale or bias that is a tensor
    get first-order gradients, which are computed in the forward pass. With ``group`` the columns are the rows y of all
    ranks, and the mean is over this rank's rows x. Raises ValueError if shapes or types differ, or if scale or bias is
    no finite number and no tensor of one element.
    """
    if check_batches:
        check_equal_batches("siglip", group, x, y)
    check_pair(x, y, "x", "y", same_rows=True)
    factor, offset = (_number(value, name, x) for value, name in ((scale, "scale"), (bias, "bias")))
    columns, first = gather_rows(y, group), first_row(x, group)
    chosen = choose_backend(backend, x)
    if chosen == "eager":
        return reference.sigmoid_loss(x, columns, factor, offset, first) / len(x)
    graded = torch.is_grad_enabled()
    need_x = graded and (x.requires_grad or factor.requires_grad or offset.requires_grad)
    need_y = graded and columns.requires_grad
    loss, *_ = op.sigmoid_terms(x, columns, factor, offset, first, need_x, need_y, chosen)
    mean: Tensor = loss / len(x)
    return mean


def _number(value: float | Tensor, name: str, x: Tensor) -> Tensor:
    """Return a number as a tensor without dimensions, at least fp32, on the device of x."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
        return value.reshape(()).to(x.device)
    check_finite(value, name)
    return x.new_full((), value, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
