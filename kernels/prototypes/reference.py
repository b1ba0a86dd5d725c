"""The definitions in plain torch. Every faster path is tested against them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import Group, mean_over_ranks
from ..precision import at_least_single


def prototype_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float,
    center: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of every student view with every *other* teacher view (DINO, arXiv 2104.14294, eq. 1-3).

    student [S, B, D], teacher [T, B, D], prototypes [K, D], center [K] or one per teacher view [T, K]:

        p_t = softmax((teacher_t P_t^T - center_t) / teacher_temp)          no gradient
        loss = mean over t, s != t and B of  -sum_k p_t,k log softmax(student_s P_s^T / student_temp)_k     (nats)

    Student and teacher see the same view of the image for s = t. SwAV's Sinkhorn codes are the case
    ``teacher_temp = epsilon, center = sinkhorn_center(...)``. Raises ValueError if there is no pair.
    """
    views, batch = (len(teacher), len(student)), student.shape[1]
    pairs = views[0] * views[1] - min(views)
    if not pairs:
        raise ValueError(f"no two different views in student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    logits = _scores(teacher.detach(), teacher_prototypes.detach())
    if center is not None:
        logits = logits - (center if center.ndim == 1 else center[:, None])
    targets = (logits / teacher_temp).softmax(-1)
    predictions = (_scores(student, student_prototypes) / student_temp).log_softmax(-1)
    # One product of [T, B K] with [B K, S] gives each pair's sum over B and K. Equal views are on the diagonal.
    crossed = _scores(targets.flatten(1).to(predictions.dtype), predictions.flatten(1))
    return (crossed.diagonal().sum() - crossed.sum()) / (pairs * batch)


def patch_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float,
    center: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy [N] of every student row [N, D] with its own teacher row [N, D], in nats.

    For the assignments see :func:`prototype_cross_entropy`. center is [K] or [1, K].
    """
    logits = _scores(teacher.detach(), teacher_prototypes.detach())
    if center is not None:
        logits = logits - center
    targets = (logits / teacher_temp).softmax(-1)
    return -(targets * (_scores(student, student_prototypes) / student_temp).log_softmax(-1)).sum(-1)


def prototype_entropy(
    features: Tensor,
    prototypes: Tensor,
    *,
    temp: float | Tensor,
    weight: Tensor | None = None,
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the marginal entropy H(mean_i p_i) and the mean conditional entropy mean_i H(p_i), in nats.

    ``p_i = softmax(features_i prototypes^T / temp)`` for features [N, D] and prototypes [K, D]. With ``group`` the
    means are over the rows of all ranks, and with ``weight`` [N] they are weighted. Uniform rows give log K, and equal
    one-hot rows 0.
    """
    log_p = (_scores(features, prototypes) / temp).log_softmax(-1)
    p = log_p.exp()
    weight = p.new_full((len(p),), 1 / len(p)) if weight is None else weight.to(p.dtype)
    # Sums, because autocast would run a product in bf16.
    marginal = mean_over_ranks((weight[:, None] * p).sum(0), group)
    conditional = mean_over_ranks(-(weight * (p * log_p).sum(-1)).sum(), group)
    # A prototype that no row chooses underflows to 0, and 0 log 0 = 0. The smallest normal number keeps log finite.
    total = marginal.detach().sum()
    total = torch.where(total > 0, total, 1)
    marginal = marginal / total
    log_marginal = marginal.clamp_min(torch.finfo(marginal.dtype).tiny).log()
    return -(marginal * log_marginal).sum(), conditional / total


def _scores(rows: Tensor, columns: Tensor) -> Tensor:
    """Return ``rows columns^T`` outside of autocast, which would round to 8 bits before the exponential."""
    with torch.autocast(rows.device.type, enabled=False):
        return at_least_single(rows) @ at_least_single(columns).T
