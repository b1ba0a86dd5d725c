"""Contrastive objectives: a row log-sum-exp of similarities minus the positives."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import Backend, choose_backend
from .checks import check_pair, check_positive
from .collectives import Group, check_equal_batches
from .precision import at_least_single
from .similarity.contrast import contrastive_loss
from .similarity.logsumexp import gain_and_factor, row_logsumexp, view_logsumexps


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> Tensor:
    """NT-Xent of two views' unit-norm projections z0, z1 [B, D] (SimCLR, arXiv 2002.05709, equation 1), in nats.

        l_i = log sum_{k != i} exp(<z_i, z_k> / temperature) - <z_i, z_j(i)> / temperature,   mean over the 2B rows

    where j(i) is the other view of the same image. The sum includes the positive, but not the row itself.
    With ``group`` the sum is over the rows of all ranks, and the mean over this rank's rows. A temperature that is a
    tensor gets a gradient. The losses [P] of pairs of views z0, z1 [P, B, D] take no more messages than one. Raises
    ValueError if shapes or types differ, or if the temperature is not above 0.
    """
    if check_batches:
        check_equal_batches("nt_xent", group, z0, z1)
    pairs = list(zip(z0, z1, strict=True)) if z0.ndim == 3 else [(z0, z1)]
    for a, b in pairs:
        check_pair(a, b, "z0", "z1", same_rows=True)
    check_positive(temperature, "temperature")
    scale = 1 / temperature
    chosen = choose_backend(backend, z0)
    if group is None and chosen != "eager":
        gain, factor = gain_and_factor(scale)
        each = [contrastive_loss(a, b, None, gain, factor, joint=True, backend=chosen) for a, b in pairs]
    else:
        rows = torch.stack([torch.cat(pair) for pair in pairs])
        lses = view_logsumexps(rows, scale=scale, exclude_self=True, unit_norm=True, backend=chosen, group=group)
        each = [lse.mean() - scale * dot_of_all(a, b) / len(a) for lse, (a, b) in zip(lses, pairs, strict=True)]
    return torch.stack(each) if z0.ndim == 3 else each[0]


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None = None,
    *,
    temperature: float | Tensor,
    in_batch: bool | None = None,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> Tensor:
    """InfoNCE of unit-norm queries q [B, D] against their keys k [B, D] (arXiv 1807.03748, equation 4), in nats.

        l_i = log sum_{j in N(i)} exp(<q_i, j> / temperature) - <q_i, k_i> / temperature,   mean over the B rows

    The candidates N(i) are k_i and its negatives. Without a queue, the negatives are the other keys of the batch. With
    ``queue`` [Q, D] they are its rows (MoCo, arXiv 1911.05722, equation 1), and with ``in_batch=True`` both. With
    ``group`` the keys of all ranks are the batch. This is one direction. For the two directions of CLIP, average with
    swapped arguments, or see :func:`bidirectional_logsumexp`. Every input that requires a gradient gets one, so detach
    keys or queue if the method does.

    Raises ValueError if shapes or types differ, the temperature is not above 0, or there are no negatives.
    """
    if in_batch is None:
        in_batch = queue is None
    if in_batch and check_batches:
        check_equal_batches("info_nce", group, q, k)
    check_pair(q, k, "q", "k", same_rows=True)
    check_positive(temperature, "temperature")
    if queue is None and not in_batch:
        raise ValueError("in_batch: must not be False without a queue, because then there are no negatives")
    if queue is not None:
        check_pair(q, queue, "q", "queue")
    scale = 1 / temperature
    chosen = choose_backend(backend, q)
    alone = (group is None and queue is None) or not in_batch
    if alone and chosen != "eager":
        gain, factor = gain_and_factor(scale)
        return contrastive_loss(q, k, queue, gain, factor, joint=False, backend=chosen)
    positives = scale * row_dots(q, k)
    lse = positives
    if in_batch:  # k_i is among the columns
        lse = row_logsumexp(q, k, scale=scale, unit_norm=True, backend=chosen, group=group, check_batches=False)
    if queue is not None:
        lse = torch.logaddexp(lse, row_logsumexp(q, queue, scale=scale, unit_norm=True, backend=chosen))
    return (lse - positives).mean()


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return ``<a_i, b_i>`` [N], in fp32 for half precision."""
    return (at_least_single(a) * at_least_single(b)).sum(1)


def dot_of_all(a: Tensor, b: Tensor) -> Tensor:
    """Return ``sum_i <a_i, b_i>``, in fp32 for half precision."""
    return torch.dot(at_least_single(a).reshape(-1), at_least_single(b).reshape(-1))
