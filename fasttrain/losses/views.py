"""Stack the views of a batch, and compute the cross-entropy of each view with the targets of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.checks import check_pair
from ..kernels.precision import at_least_single


def stack_views(views: Sequence[Tensor], name: str) -> Tensor:
    """Return views [B, D] as one tensor [V, B, D].

    Raise ValueError, which names the argument, for no views, or if they differ in shape, dtype or device.
    """
    if not len(views):
        raise ValueError(f"{name} must hold at least one view [B, D], got none")
    for number, view in enumerate(views):
        check_pair(views[0], view, f"{name}[0]", f"{name}[{number}]", same_rows=True)
    return torch.stack(list(views))


def count_pairs(first: Tensor, second: Tensor, first_name: str, second_name: str) -> int:
    """Return the number of pairs of different views between [T, B, D] and [S, B, D]: T S - min(T, S).

    View i of both tensors is the same view. Raise ValueError if there is no pair, or if the batch or the last dimension
    differs.
    """
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"views of {first_name} and {second_name} must have the same shape, "
            f"got {tuple(first.shape[1:])} and {tuple(second.shape[1:])}"
        )
    pairs = len(first) * len(second) - min(len(first), len(second))
    if not pairs:
        raise ValueError(
            f"at least two views are needed, because a view is not paired with itself: got {len(first)} in "
            f"{first_name} and {len(second)} in {second_name}"
        )
    return pairs


def cross_entropy_of_others(targets: Tensor, logits: Tensor, *, temp: float) -> Tensor:
    """Return ``mean over t, s != t and B of  -sum_k targets_t,k log softmax(logits_s / temp)_k``, in nats.

    ``targets`` [T, B, K] are probabilities, ``logits`` are [S, B, K]. For t = s they are the same view.
    """
    pairs = count_pairs(targets, logits, "targets", "logits")
    same = torch.eye(len(targets), len(logits), dtype=torch.bool, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):  # a sum over B K terms needs full precision
        log_p = (at_least_single(logits) / temp).log_softmax(-1)
        # One product of [T, B K] with [B K, S] gives every pair's sum over B and K; equal views are on the diagonal.
        crossed = targets.to(log_p.dtype).flatten(1) @ log_p.flatten(1).T
    return -crossed.masked_fill(same, 0).sum() / (pairs * logits.shape[1])
