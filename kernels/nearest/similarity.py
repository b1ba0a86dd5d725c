"""The largest inner product of each row with the other rows, on every backend and across ranks."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, choose_backend
from ..checks import check_rows
from ..collectives import Group, check_equal_batches, first_row, gather_rows, ranks_of
from ..contrastive import row_dots
from . import op, reference


def nearest_similarity(
    x: Tensor,
    *,
    exclude_self: bool = True,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return ``max_j <x_i, x_j>`` [N] over the rows x [N, D], and its j [N], int64.

    The scores are never stored: memory is O(N D). The gradient passes through the chosen pairs only, to both rows.
    Products are at least fp32. ``exclude_self`` leaves out j = i. A NaN counts as the largest score.

    With ``group`` the columns are the rows of all ranks, and j counts them in rank order. Raises ValueError if x is not
    floating point [N, D], or if a row has no other row.
    """
    if check_batches:
        check_equal_batches("nearest_similarity", group, x)
    rows, places = nearest_rows(x, exclude_self=exclude_self, backend=backend, group=group)
    return row_dots(x, rows), places


def nearest_rows(x: Tensor, *, exclude_self: bool, backend: Backend, group: Group | None) -> tuple[Tensor, Tensor]:
    """Return the row x_j [N, D] with the largest ``<x_i, x_j>``, with its gradient, and its j [N].

    For the arguments see :func:`nearest_similarity`. All ranks must have equal batches.
    """
    check_rows(x, "x")
    if exclude_self and len(x) * ranks_of(group) < 2:
        raise ValueError(f"x: must have at least 2 rows, so that each has another one, got {tuple(x.shape)}")
    excluded = first_row(x, group) if exclude_self else None
    chosen = choose_backend(backend, x)
    columns = gather_rows(x, group)
    if chosen == "eager":
        places = reference.nearest_similarity(x.detach(), columns.detach(), excluded)[1]
    else:
        places = op.nearest(x.detach(), None if group is None else columns.detach(), excluded, chosen)
    return columns.index_select(0, places), places
