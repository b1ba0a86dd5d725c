"""Log-sum-exps of scaled similarities, differentiable, on every backend and across ranks."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, choose_backend
from ..checks import check_finite, check_pair
from ..collectives import Group, first_row, gather_rows
from . import op, reference
from .ranks import row_logsumexp_over_ranks


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
) -> Tensor:
    """``lse_i = log sum_j exp(scale <x_i, y_j> + bias_j)`` for x [N, D] and y [M, D]; returns [N], in nats.

    The scores are never stored: memory is O((N + M) D). The result is fp32 (fp64 for fp64 inputs) and accumulated in
    it; inputs may be fp16, bf16, fp32 or fp64. Gradients: x, y, bias and, if it is a tensor, scale; first order.

    - ``y is x`` takes half the work, forward and backward.
    - ``exclude_self`` leaves out j = i. A row with nothing left to sum is -inf and passes no gradient on.
    - ``unit_norm`` is the caller's promise that no row is longer than 1. On a GPU it spares the running maximum where
      |scale| <= 40; on the CPU the rows are measured instead.
    - With ``group`` the columns are all ranks' y; ``exclude_self`` then leaves out a row's own copy.

    Raises ValueError for shapes, types or a scale that do not fit.
    """
    check_pair(x, y, "x", "y", same_rows=exclude_self and group is not None)
    _check_scale(scale)
    if bias is not None and (bias.shape != y.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias must be one number a row of y, [{y.shape[0]}], got {tuple(bias.shape)} {bias.dtype}")
    if bias is not None and group is not None:
        raise ValueError("bias does not cross ranks; leave out bias or group")
    chosen = choose_backend(backend, x)
    if chosen == "eager":
        everyone = gather_rows(y, group)
        excluded = first_row(x, group) if exclude_self else None
        return reference.row_logsumexp(x, everyone, scale=scale, bias=bias, excluded=excluded)
    gain, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    if group is not None:
        return row_logsumexp_over_ranks(x, y, gain, factor, exclude_self, unit_norm, chosen, group)
    if y is x and bias is None:
        lse: Tensor
        lse, _ = op.self_lse(x, gain, factor, exclude_self, unit_norm, chosen)
        return lse
    rows: Tensor
    rows, _ = op.pair_lse(x, y, bias, gain, factor, 0 if exclude_self else None, unit_norm, False, chosen)
    return rows


def bidirectional_logsumexp(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    unit_norm: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exps of ``scale <x_i, y_j>``, [N] and [M], from one pass over the scores.

    Where the scores are not known to be bounded (see :func:`row_logsumexp`), from two. Raises ValueError for shapes,
    types or a scale that do not fit.
    """
    check_pair(x, y, "x", "y")
    _check_scale(scale)
    chosen = choose_backend(backend, x)
    if chosen == "eager":
        return reference.bidirectional_logsumexp(x, y, scale=scale)
    gain, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    found: tuple[Tensor, Tensor] = op.pair_lse(x, y, None, gain, factor, None, unit_norm, True, chosen)
    return found


def _check_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must be one number, got a tensor of shape {tuple(scale.shape)}")
    else:
        check_finite(scale, "scale")
