"""Cross-entropy and entropies over prototypes, without logits (DINO, SwAV, and their entropy-reconstruction bounds).

With the student's assignment P and the teacher's assignment p, sum_k p_k = 1 removes the logits from the cross-entropy:

    -sum_k p_k log P_k = lse(h W^T / temp) - <h, o> / temp,     o = sum_k p_k w_k

So the student needs a log-sum-exp over prototypes, and a teacher's view is reduced to one vector o of D numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import Backend, choose_backend
from ..checks import check_pair, check_positive, check_rows
from ..collectives import Group, check_equal_batches, mean_over_ranks
from ..precision import accumulation_type
from . import reference
from .op import prototype_loss


def prototype_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float,
    center: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the cross-entropy of every student view with every *other* teacher view (DINO, arXiv 2104.14294, eq. 1-3).

    student [S, B, D], teacher [T, B, D], prototypes [K, D], center [K] or one per teacher view [T, K]:

        p_t = softmax((teacher_t P_t^T - center_t) / teacher_temp)          no gradient
        loss = mean over t, s != t and B of  -sum_k p_t,k log softmax(student_s P_s^T / student_temp)_k     (nats)

    Student and teacher see the same view of the image for s = t. SwAV's Sinkhorn codes are the case
    ``teacher_temp = epsilon, center = sinkhorn_center(...)``. Memory is O((S + T) B D + K D). First-order gradients
    exist for student, student_prototypes, and student_temp if it is a tensor. Raises ValueError if shapes, types or
    temperatures do not fit, or if there is no pair.
    """
    loss, _ = prototype_terms(
        student,
        teacher,
        student_prototypes,
        teacher_prototypes,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        center=center,
        entropy=False,
        backend=backend,
    )
    return loss


def prototype_terms(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float,
    center: Tensor | None = None,
    entropy: bool = True,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return :func:`prototype_cross_entropy` and the entropy H(mean student assignment), both in nats.

    The mean is over all views and ranks. Both terms come from the same passes. Without ``entropy`` the second one is
    empty. For shapes and errors see :func:`prototype_cross_entropy`.
    """
    if entropy and check_batches:
        check_equal_batches("prototype_terms", group, student)
    _check_views(student, teacher, student_prototypes, teacher_prototypes, center)
    check_positive(student_temp, "student_temp")
    check_positive(teacher_temp, "teacher_temp")
    chosen = choose_backend(backend, student)
    if chosen == "eager":
        loss = reference.prototype_cross_entropy(
            student,
            teacher,
            student_prototypes,
            teacher_prototypes,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            center=center,
        )
        if not entropy:
            return loss, loss.new_empty(0)
        rows = student.flatten(0, 1)
        return loss, reference.prototype_entropy(rows, student_prototypes, temp=student_temp, group=group)[0]
    student, scale = _scaled(student, student_temp)
    loss, marginal = _loss(
        student,
        teacher.detach(),
        student_prototypes,
        teacher_prototypes.detach(),
        _bias(center, teacher_temp, student),
        None,
        scale,
        1 / teacher_temp,
        own=False,
        marginal=entropy,
        backend=chosen,
    )
    return loss, _entropy(mean_over_ranks(marginal, group)) if entropy else marginal


def patch_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temp: float | Tensor,
    teacher_temp: float,
    center: Tensor | None = None,
    weight: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the cross-entropy of every student row with its own teacher row (iBOT, arXiv 2111.07832, eq. 2), in nats.

    student, teacher [N, D] are the masked patches of all images; prototypes [K, D], center [K]. weight [N] is, for
    example, a mask or 1 / number of masked patches of the row's image:

        loss = sum_i weight_i CE(p_i, P_i) / sum_i weight_i,   p and P as in :func:`prototype_cross_entropy`

    Without rows (N = 0), and for weights that sum to 0, the loss and its gradients are 0.

    Memory is O(N D + K D). At 8,192 rows and 65,536 prototypes this saves 2 GiB per copy of the logits. Gradients exist
    as in :func:`prototype_cross_entropy`, and not for weight. Raises ValueError if shapes, types or temperatures do not
    fit.
    """
    check_pair(student, teacher, "student", "teacher", same_rows=True, least_rows=0)
    _check_prototypes(student_prototypes, teacher_prototypes, student.shape[1], center, parts=1)
    check_positive(student_temp, "student_temp")
    check_positive(teacher_temp, "teacher_temp")
    if weight is None:
        weight = student.new_ones(len(student))
    _check_weight(weight, student)
    weight = weight.detach().to(accumulation_type(student))
    total = weight.sum()
    weight = torch.where(total == 0, 0, weight / total)
    chosen = choose_backend(backend, student)
    if chosen == "eager" or not len(student):  # without rows the definition stores nothing
        rows = reference.patch_cross_entropy(
            student,
            teacher,
            student_prototypes,
            teacher_prototypes,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            center=center,
        )
        return (weight.to(rows.dtype) * rows).sum()
    student, scale = _scaled(student, student_temp)
    loss, _ = _loss(
        student[None],
        teacher.detach()[None],
        student_prototypes,
        teacher_prototypes.detach(),
        _bias(center, teacher_temp, student),
        weight,
        scale,
        1 / teacher_temp,
        own=True,
        marginal=False,
        backend=chosen,
    )
    return loss


def _check_weight(weight: Tensor, rows: Tensor) -> None:
    """Raise ValueError unless there is one weight per row."""
    if weight.shape != rows.shape[:1]:
        raise ValueError(f"weight must be one number per row, [{len(rows)}], got {tuple(weight.shape)}")


def prototype_entropy(
    features: Tensor,
    prototypes: Tensor,
    *,
    temp: float | Tensor,
    weight: Tensor | None = None,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the marginal entropy H(mean_i p_i) and the mean conditional entropy mean_i H(p_i), in nats.

    ``p_i = softmax(features_i prototypes^T / temp)`` for features [N, D] and prototypes [K, D]. With ``group`` the
    means are over the rows of all ranks. Uniform rows give log K, equal one-hot rows 0, and no result is negative.
    Memory is O((N + K) D). The entropies [H] of heads with the prototypes [H, K, D] take no more messages than one.

    With ``weight`` [N] the means are weighted, and the ranks may have different numbers of rows, but at least one. Both
    entropies are 0 if all weights are 0. Raises ValueError if shapes, types or the temperature do not fit.
    """
    if check_batches and weight is None:
        check_equal_batches("prototype_entropy", group, features)
    heads = prototypes if prototypes.ndim == 3 else prototypes[None]
    for head in heads:
        check_pair(features, head, "features", "prototypes")
    check_positive(temp, "temp")
    if weight is not None:
        _check_weight(weight, features)
        weight = weight.detach().to(accumulation_type(features))
    chosen = choose_backend(backend, features)
    if chosen == "eager":
        each = [reference.prototype_entropy(features, head, temp=temp, weight=weight, group=group) for head in heads]
    else:
        features, scale = _scaled(features, temp)
        means = []
        for head in heads:
            conditional, marginal = _loss(
                features[None], None, head, None, None, weight, scale, 1.0, own=False, marginal=True, backend=chosen
            )
            means.append(torch.cat([marginal, conditional.clamp_min(0)[None]]))
        each = [_entropies(mean[:-1], mean[-1]) for mean in mean_over_ranks(torch.stack(means), group)]
    marginals, conditionals = (torch.stack(values) for values in zip(*each, strict=True))
    return (marginals, conditionals) if prototypes.ndim == 3 else (marginals[0], conditionals[0])


def _loss(
    student: Tensor,
    teacher: Tensor | None,
    prototypes: Tensor,
    *args: Any,
    own: bool,
    marginal: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the mean assignment of a :class:`~.problem.Problem`. Gradients cost only if required."""
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (student, prototypes)]
    loss, mean, *_ = prototype_loss(student, teacher, prototypes, *args, own, marginal, *needs, backend)
    return loss, mean


def _entropies(p: Tensor, conditional: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entropy of weights p, and the conditional entropy divided by their sum; 0 if the sum is 0."""
    total = p.detach().sum()
    marginal = torch.where(total > 0, _entropy(torch.where(total > 0, p, 1)), 0)
    return marginal, conditional / total.clamp_min(torch.finfo(p.dtype).tiny)


def _entropy(p: Tensor) -> Tensor:
    """Return ``-sum p log p``, with 0 log 0 = 0. p is divided by its sum, which is 1 up to rounding."""
    total = p.sum()
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    return (total.log() - (p * log_p).sum() / total).clamp_min(0)


def _scaled(rows: Tensor, temp: float | Tensor) -> tuple[Tensor, float]:
    """Return rows and scale. A temperature that is a tensor scales the rows, so that autograd gives its gradient."""
    return (rows.to(accumulation_type(rows)) / temp, 1.0) if isinstance(temp, Tensor) else (rows, 1 / temp)


def _check_views(
    student: Tensor, teacher: Tensor, student_prototypes: Tensor, teacher_prototypes: Tensor, center: Tensor | None
) -> None:
    """Raise ValueError if the shapes do not fit, or if there is no pair of different views."""
    for views, name in ((student, "student"), (teacher, "teacher")):
        if views.ndim != 3 or 0 in views.shape:
            raise ValueError(f"{name} must be [views, B, D], none of them 0, got {tuple(views.shape)}")
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"student and teacher must have the same B and D, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    _check_prototypes(student_prototypes, teacher_prototypes, student.shape[2], center, parts=len(teacher))
    if len(teacher) == len(student) == 1:
        raise ValueError(f"no two different views in student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")


def _check_prototypes(student: Tensor, teacher: Tensor, dim: int, center: Tensor | None, *, parts: int) -> None:
    """Raise ValueError unless prototypes are [K, dim], and center is [K] or [parts, K]."""
    check_rows(student, "student_prototypes")
    check_rows(teacher, "teacher_prototypes")
    count = len(student)
    if student.shape != (count, dim) or teacher.shape != (count, dim):
        raise ValueError(
            f"prototypes must be alike and of the views' D = {dim}, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if center is not None and center.shape not in ((count,), (parts, count)):
        raise ValueError(f"center must be [{count}] or [{parts}, {count}], got {tuple(center.shape)}")


def _bias(center: Tensor | None, teacher_temp: float, like: Tensor) -> Tensor | None:
    """Return the centre as a bias of the teacher's scores, with one row per part."""
    if center is None:
        return None
    return center.detach().to(accumulation_type(like)).view(-1, center.shape[-1]) / -teacher_temp
