"""Sinkhorn-Knopp in potentials: the definition in plain torch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import Group


@torch.no_grad()
def sinkhorn_center(
    scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3, group: Group | None = None
) -> Tensor:
    """Return the column potential of the balanced assignment of B rows to K prototypes: ``center`` [K], fp32.

    ``softmax((scores - center) / epsilon)`` over K is the assignment itself (:func:`sinkhorn`). Each iteration first
    makes the columns sum to B / K, then the rows to 1 (SwAV, arXiv 2006.09882, section 3.1). With ``group`` the rows of
    all ranks are the batch. Scores [B, K] may have any float type.
    """
    logits = scores.float() / epsilon
    row = torch.zeros(len(logits), device=logits.device)
    column = torch.zeros(logits.shape[1], device=logits.device)
    for _ in range(iterations):
        column = -logsumexp_over_ranks((logits + row[:, None]).logsumexp(0), group)
        row = -(logits + column).logsumexp(1)
    return -epsilon * column


def logsumexp_over_ranks(local: Tensor, group: Group | None) -> Tensor:
    """Return ``log sum exp`` over the ranks, for every number; some may be -inf."""
    if group is None:
        return local
    peak = local.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    peak = torch.where(peak == -torch.inf, 0, peak)
    total = (local - peak).exp()
    dist.all_reduce(total, group=group)
    return total.log() + peak


def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3, group: Group | None = None) -> Tensor:
    """Return the balanced soft assignment [B, K], fp32. Rows sum to 1, and columns to nearly B / K."""
    center = sinkhorn_center(scores, epsilon=epsilon, iterations=iterations, group=group)
    return ((scores.float() - center) / epsilon).softmax(1)
