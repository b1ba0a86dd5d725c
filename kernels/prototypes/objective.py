"""Cross-entropy and entropies over prototypes, without logits (DINO, SwAV, and their entropy-reconstruction twins).

With P the student's and p the teacher's assignment, sum_k p_k = 1 takes the logits out of the cross-entropy:

    -sum_k p_k log P_k = lse(h W^T / temp) - <h, o> / temp,     o = sum_k p_k w_k

so the student needs a log-sum-exp over prototypes, and of a teacher's view remains one vector o of D numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, choose_backend
from ..checks import check_pair, check_positive, check_rows
from ..collectives import Group, mean_over_ranks
from ..similarity.op import accumulation_type
from . import reference
from .op import prototype_terms as _terms


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
    """Cross-entropy of every student view with every *other* teacher view (DINO, arXiv 2104.14294, equations 1 to 3).

    student [S, B, D], teacher [T, B, D], prototypes [K, D], center [K] or one a teacher view [T, K]:

        p_t = softmax((teacher_t P_t^T - center_t) / teacher_temp)          no gradient
        loss = mean over t, s != t and B of  -sum_k p_t,k log softmax(student_s P_s^T / student_temp)_k     (nats)

    View s of the student is the same image view as view s of the teacher, for s < T. SwAV's Sinkhorn codes are the
    case ``teacher_temp = epsilon, center = sinkhorn_center(...)``. Memory is O((S + T) B D + K D). Gradients: student,
    student_prototypes and, if it is a tensor, student_temp; first order. Raises ValueError for shapes, types or
    temperatures that do not fit, or if no pair is left.
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
) -> tuple[Tensor, Tensor]:
    """:func:`prototype_cross_entropy` and H(mean student assignment) of all views and ranks, from the same passes.

    In nats; without ``entropy`` the second is empty. Shapes and errors as there.
    """
    pairs = _check_views(student, teacher, student_prototypes, teacher_prototypes, center)
    check_positive(student_temp, "student_temp")
    check_positive(teacher_temp, "teacher_temp")
    chosen = choose_backend(backend, student)
    (views, batch, _), teachers = student.shape, teacher.shape[0]
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
    rows = student.flatten(0, 1)
    weights = rows.new_full((len(rows),), 1 / len(rows), dtype=accumulation_type(student)) if entropy else None
    lse, attended, _, marginal, *_ = _terms(
        rows,
        teacher.detach().flatten(0, 1),
        student_prototypes,
        teacher_prototypes.detach(),
        _bias(center, teacher_temp, student),
        weights,
        scale,
        1 / teacher_temp,
        False,
        chosen,
    )
    # Each view of the student meets all teacher views but its own.
    targets = attended.view(teachers, batch, -1)
    others = targets.sum(0).expand(views, -1, -1)
    own = torch.cat([targets, targets.new_zeros(views, *targets.shape[1:])])[:views]
    met = student.new_full((views, 1), teachers, dtype=lse.dtype)
    met[:teachers] -= 1
    with torch.autocast(student.device.type, enabled=False):
        dots = (student.to(lse.dtype) * (others - own)).sum() * scale
    loss = ((lse.view(views, batch) * met).sum() - dots) / (pairs * batch)
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
    """Cross-entropy of every student row with its own teacher row (iBOT, arXiv 2111.07832, equation 2), in nats.

    student, teacher [N, D], the masked patches of all images; prototypes [K, D], center [K]; weight [N], such as
    1 / masked patches of the row's image, or a mask:

        loss = sum_i weight_i CE(p_i, P_i) / sum_i weight_i,   p and P as in :func:`prototype_cross_entropy`

    Memory is O(N D + K D), which at 8,192 rows and 65,536 prototypes spares 2 GiB a copy of the logits. Gradients as
    there, and weight has none. Raises ValueError for shapes, types or temperatures that do not fit.
    """
    check_pair(student, teacher, "student", "teacher", same_rows=True)
    _check_prototypes(student_prototypes, teacher_prototypes, student.shape[1], center, parts=1)
    check_positive(student_temp, "student_temp")
    check_positive(teacher_temp, "teacher_temp")
    if weight is not None and weight.shape != student.shape[:1]:
        raise ValueError(f"weight must be one number a row, [{len(student)}], got {tuple(weight.shape)}")
    chosen = choose_backend(backend, student)
    if chosen == "eager":
        rows = reference.patch_cross_entropy(
            student,
            teacher,
            student_prototypes,
            teacher_prototypes,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            center=center,
        )
    else:
        student, scale = _scaled(student, student_temp)
        lse, attended, *_ = _terms(
            student,
            teacher.detach(),
            student_prototypes,
            teacher_prototypes.detach(),
            _bias(center, teacher_temp, student),
            None,
            scale,
            1 / teacher_temp,
            False,
            chosen,
        )
        rows = lse - scale * (student.to(lse.dtype) * attended).sum(1)
    if weight is None:
        return rows.mean()
    weight = weight.detach().to(rows.dtype)
    return (weight * rows).sum() / weight.sum()


def prototype_entropy(
    features: Tensor,
    prototypes: Tensor,
    *,
    temp: float | Tensor,
    backend: Backend = "auto",
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """Marginal entropy H(mean_i p_i) and mean conditional entropy mean_i H(p_i), in nats.

    ``p_i = softmax(features_i prototypes^T / temp)`` for features [N, D] and prototypes [K, D]. The marginal is that
    of all ranks' rows if ``group`` is given. Uniform rows give log K, equal one-hot rows 0, and nothing is negative.
    Memory is O((N + K) D). Raises ValueError for shapes, types or a temperature that do not fit.
    """
    check_pair(features, prototypes, "features", "prototypes")
    check_positive(temp, "temp")
    chosen = choose_backend(backend, features)
    if chosen == "eager":
        return reference.prototype_entropy(features, prototypes, temp=temp, group=group)
    features, scale = _scaled(features, temp)
    weights = features.new_full((len(features),), 1 / len(features), dtype=accumulation_type(features))
    lse, _, _, marginal, energies, *_ = _terms(
        features, None, prototypes, None, None, weights, scale, 1.0, True, chosen
    )
    conditional = (lse - energies).mean().clamp_min(0)
    return _entropy(mean_over_ranks(marginal, group)), mean_over_ranks(conditional, group)


def _entropy(p: Tensor) -> Tensor:
    """``-sum p log p`` of p that sums to 1 but for rounding, which is divided out; 0 log 0 = 0."""
    total = p.sum()
    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
    return (total.log() - (p * log_p).sum() / total).clamp_min(0)


def _scaled(rows: Tensor, temp: float | Tensor) -> tuple[Tensor, float]:
    """A temperature that is a tensor goes into the rows, where autograd finds its gradient."""
    return (rows.to(accumulation_type(rows)) / temp, 1.0) if isinstance(temp, Tensor) else (rows, 1 / temp)


def _check_views(
    student: Tensor, teacher: Tensor, student_prototypes: Tensor, teacher_prototypes: Tensor, center: Tensor | None
) -> int:
    """The number of pairs of different views. Raises ValueError for what does not fit."""
    for views, name in ((student, "student"), (teacher, "teacher")):
        if views.ndim != 3 or 0 in views.shape:
            raise ValueError(f"{name} must be [views, B, D], none of them 0, got {tuple(views.shape)}")
    if student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"student and teacher must have the same B and D, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    _check_prototypes(student_prototypes, teacher_prototypes, student.shape[2], center, parts=len(teacher))
    pairs = len(teacher) * len(student) - min(len(teacher), len(student))
    if not pairs:
        raise ValueError(f"no two different views in student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return pairs


def _check_prototypes(student: Tensor, teacher: Tensor, dim: int, center: Tensor | None, *, parts: int) -> None:
    """Both prototypes [K, dim], and a centre [K] or one for each of the teacher's parts."""
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
    """The centre as a bias of the teacher's scores, a row for each of its parts."""
    if center is None:
        return None
    return center.detach().to(accumulation_type(like)).view(-1, center.shape[-1]) / -teacher_temp
