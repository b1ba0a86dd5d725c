"""Contrastive objectives: a row log-sum-exp of similarities, less the positives."""

from __future__ import annotations

import torch
from torch import Tensor

from .collectives import Group, first_row, gather_rows
from .similarity.reference import row_logsumexp


def nt_xent(z0: Tensor, z1: Tensor, *, temperature: float | Tensor, group: Group | None = None) -> Tensor:
    """NT-Xent of two views' unit-norm projections z0, z1 [B, D] (SimCLR, arXiv 2002.05709, equation 1), in nats.

        l_i = log sum_{k != i} exp(<z_i, z_k> / temperature) - <z_i, z_j(i)> / temperature,   mean over the 2B rows

    where j(i) is the other view of the same image: the positive stands in the sum, the row itself does not.
    With ``group`` the sum runs over the rows of all ranks and the mean over this rank's own.
    """
    scale = 1 / temperature
    positives = scale * (z0 * z1).sum(1)
    rows = torch.cat([z0, z1])
    lse = row_logsumexp(
        rows, gather_rows(rows, group), scale=scale, exclude_self=True, first_row=first_row(rows, group)
    )
    return lse.mean() - positives.mean()
