"""Differentiable log-sum-exps of scaled similarities, on every backend and across ranks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..backend import Backend, choose_backend
from ..checks import check_finite, check_pair
from ..collectives import Group, check_equal_batches, first_row, gather_rows
from . import op, reference
from .ranks import row_logsumexp_over_ranks, view_logsumexps_over_ranks


def row_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    bias: Tensor | None = None,
    exclude_self: bool = False,
    unit_norm: bool = False,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> Tensor:
    """Return ``lse_i = log sum_j exp(scale <x_i, y_j> + bias_j)`` [N] in nats, for x [N, D] and y [M, D].

    The scores are never stored: memory is O((N + M) D). Inputs may be fp16, bf16, fp32 or fp64. Accumulation and result
    are fp32, or fp64 for fp64 inputs. First-order gradients exist for x, y, bias, and scale if it is a tensor.

    - ``y is x`` takes half the work, forward and backward.
    - ``exclude_self`` leaves out j = i. A row with an empty sum is -inf and has no gradient.
    - ``unit_norm`` is the caller's promise that no row is longer than 1. On a GPU it saves the running maximum if
      |scale| <= 40. Longer rows are exact while no score exceeds 80 nats. Beyond, a GPU gives infinite values and NaN,
      because a check would wait for the device, and the CPU, which checks the sums, is still exact.
    - With ``group`` the columns are the rows y of all ranks, the same number on each. ``exclude_self`` then leaves out
      a row's own copy. If y requires a gradient, all ranks must have the same number of rows x, too.

    Raises ValueError if shapes, types or the scale do not fit.
    """
    if bias is not None and group is not None:
        raise ValueError("bias does not cross ranks; leave out bias or group")
    if check_batches:  # the backward pass for y gathers x, too
        check_equal_batches("row_logsumexp", group, y, *([x] if y.requires_grad else []))
    check_pair(x, y, "x", "y", same_rows=exclude_self and group is not None)
    gain, factor = gain_and_factor(scale)
    if bias is not None and (bias.shape != y.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias must be one number per row of y, [{y.shape[0]}], got {tuple(bias.shape)} {bias.dtype}")
    chosen = choose_backend(backend, x)
    if chosen == "eager":
        all_y = gather_rows(y, group)
        excluded = first_row(x, group) if exclude_self else None
        return reference.row_logsumexp(x, all_y, scale=scale, bias=bias, excluded=excluded)
    if group is not None:
        return row_logsumexp_over_ranks(x, y, gain, factor, exclude_self, unit_norm, chosen, group)
    if y is x and bias is None:
        lse: Tensor
        lse, _ = op.self_lse(x, gain, factor, exclude_self, unit_norm, chosen)
        return lse
    # Without a gradient for the columns, their mean is the gradient of each row up to a factor.
    fixed = not (y.requires_grad or (bias is not None and bias.requires_grad))
    needed = x.requires_grad or (gain is not None and gain.requires_grad)
    attend = chosen == "cpu" and torch.is_grad_enabled() and needed and fixed
    excluded = 0 if exclude_self else None
    rows: Tensor = op.pair_lse(x, y, bias, gain, factor, excluded, unit_norm, False, attend, chosen)[0]
    return rows


def view_logsumexps(
    views: Tensor,
    *,
    scale: float | Tensor,
    exclude_self: bool = False,
    unit_norm: bool = False,
    backend: Backend = "auto",
    group: Group | None = None,
) -> Tensor:
    """Return :func:`row_logsumexp` of every view with itself, [V, N], for rows [V, N, D].

    With ``group`` all views cross the ranks in one message each way. All ranks must have equal batches.
    """
    chosen = choose_backend(backend, views)
    if group is not None and chosen != "eager":
        gain, factor = gain_and_factor(scale)
        return view_logsumexps_over_ranks(views, gain, factor, exclude_self, unit_norm, chosen, group)
    each = partial(
        row_logsumexp,
        scale=scale,
        exclude_self=exclude_self,
        unit_norm=unit_norm,
        backend=backend,
        group=group,
        check_batches=False,
    )
    return torch.stack([each(x, x) for x in views])


def bidirectional_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    unit_norm: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return row and column log-sum-exps of ``scale <x_i, y_j>``, [N] and [M], reading the scores once.

    If the scores are not known to be bounded (see :func:`row_logsumexp`), they are computed twice. Raises ValueError if
    shapes, types or the scale do not fit.
    """
    check_pair(x, y, "x", "y")
    gain, factor = gain_and_factor(scale)
    chosen = choose_backend(backend, x)
    if chosen == "eager":
        return reference.bidirectional_logsumexp(x, y, scale=scale)
    rows, columns, _ = op.pair_lse(x, y, None, gain, factor, None, unit_norm, True, False, chosen)
    return rows, columns


def gain_and_factor(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """Return the factors of a scale as the operators take them: a tensor that may get a gradient, and a number.

    Raise ValueError if the scale is no finite number and no tensor of one element.
    """
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must be one number, got a tensor of shape {tuple(scale.shape)}")
        return scale, 1.0
    check_finite(scale, "scale")
    return None, float(scale)
