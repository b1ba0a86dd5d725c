"""The CPU path: tiles of prototypes with all rows, and no stored logits.

    s_ik = scale_s <h_i, w_k>        P = softmax_k(s)       student rows h [R, D], prototypes w [K, D]
    t_jk = scale_t <q_j, v_k> + b_k  p = softmax_k(t)       teacher rows q [T, D], prototypes v [K, D], no gradient

    forward    lse_i, the log of the softmax's sum;   o_j = sum_k p_jk w_k, the only term of the teacher in the loss:
               attention with the teacher's rows as queries, its prototypes as keys and w as values;
               m_k = sum_i r_i P_ik, the weighted marginal;   e_i = sum_k P_ik s_ik
    backward   G_ik = P_ik (a_i + r_i g_k + c_i s_ik),   with a, g, c the gradients of lse, m, e, where
               r_i sum_k P_ik g_k and c_i (e_i - 1) are subtracted from a_i
               dh = scale_s G w,   dw_k = scale_s G_k^T h + p_k^T do

Everything is in base 2 with exp2, as in similarity/cpu.py. If the probabilities take at most 8 MB, they are computed
once and saved for the backward pass. It then needs three products instead of four, and no exponential.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..similarity import cpu as similarity
from ..similarity.cpu import CLAMP, LOG2E, accumulable

_AREA = 768 * 768
_KEPT = 1 << 21

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def is_kept(rows: int, prototypes: int) -> bool:
    """Return whether the probabilities of this many rows are saved for the backward pass."""
    return rows * prototypes <= _KEPT


def terms(
    student: Tensor,
    teacher: Tensor | None,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    *,
    student_scale: float,
    teacher_scale: float,
    energy: bool,
) -> Terms:
    """Return lse [R], o [T, D], the teacher's lse [T], m [K], e [R], P [R, K] and p [T, K].

    Terms that are not requested are empty, and so are P and p unless :func:`is_kept`. bias is [V, K], one row for each
    of V equal parts of the teacher's rows. weights are r, and request m.
    """
    h, w = accumulable(student), student_prototypes
    kept, kept_teacher = h.new_empty(0, 0), h.new_empty(0, 0)
    if is_kept(len(h), len(w)):
        kept, lse = _softmax_of_all(h, w, None, student_scale)
    else:
        lse, _ = similarity.pair_lse(
            h, accumulable(w), None, None, scale=student_scale, excluded=None, unit_norm=False, columns=False
        )
    attended, teacher_lse = h.new_empty(0), h.new_empty(0)
    if teacher is not None and teacher_prototypes is not None:
        q = accumulable(teacher)
        if is_kept(len(q), len(w)):
            kept_teacher, teacher_lse = _softmax_of_all(q, teacher_prototypes, bias, teacher_scale)
            attended = torch.mm(kept_teacher, accumulable(w), out=q.new_empty(q.shape))
        else:
            attended, teacher_lse = _attend(q, teacher_prototypes, w, bias, teacher_scale)
    marginal = h.new_empty(0 if weights is None else len(w))
    mean = torch.zeros_like(h) if energy else None
    if weights is not None or energy:
        for k, p in _probabilities(h, w, None, student_scale, lse, kept):
            if weights is not None:
                torch.mv(p.T, weights, out=marginal[k])
            if mean is not None:
                mean.addmm_(p, accumulable(w[k]))
    # sum_k P_ik s_ik = <h_i, scale sum_k P_ik w_k>
    energies = h.new_empty(0) if mean is None else (h * mean).sum(1).mul_(student_scale)
    return lse, attended, teacher_lse, marginal, energies, kept, kept_teacher


def backward(
    student: Tensor,
    teacher: Tensor | None,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    lse: Tensor,
    teacher_lse: Tensor,
    energies: Tensor,
    kept: Tensor,
    kept_teacher: Tensor,
    lse_grad: Tensor | None,
    attended_grad: Tensor | None,
    marginal_grad: Tensor | None,
    energy_grad: Tensor | None,
    *,
    student_scale: float,
    teacher_scale: float,
    need_student: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the student's rows [R, D] and prototypes [K, D], in the type of accumulation.

    Those not needed are empty.
    """
    h, w = accumulable(student), student_prototypes
    of_rows = torch.zeros_like(lse) if lse_grad is None else lse_grad
    if weights is None:
        marginal_grad = None
    if marginal_grad is not None and weights is not None:
        mean_grad = torch.zeros_like(lse)
        for k, p in _probabilities(h, w, None, student_scale, lse, kept):
            mean_grad += torch.mv(p, marginal_grad[k])
        of_rows = of_rows - weights * mean_grad
    if energy_grad is not None:
        of_rows = of_rows + energy_grad * (1 - energies)
    dh = h.new_zeros(h.shape if need_student else (0,))
    dw = h.new_empty(w.shape if need_prototypes else (0,))
    room = None
    for k, p in _probabilities(h, w, None, student_scale, lse, kept):
        if room is None:
            room = torch.empty_like(p)  # the first tile is the largest
        grad = room.view(-1)[: p.numel()].view_as(p)
        if marginal_grad is not None and weights is not None:
            torch.outer(weights, marginal_grad[k], out=grad)
            grad += of_rows[:, None]
            grad *= p
        else:
            torch.mul(p, of_rows[:, None], out=grad)
        if energy_grad is not None:
            # c_i P_ik s_ik: the scores are computed again, because few losses need this gradient.
            scores = torch.mm(h, accumulable(w[k]).T, out=torch.empty_like(p)).mul_(student_scale)
            grad += scores.mul_(p).mul_(energy_grad[:, None])
        if need_student:
            dh.addmm_(grad, accumulable(w[k]), alpha=student_scale)
        if need_prototypes:
            dw[k].addmm_(grad.T, h, beta=0, alpha=student_scale)
    if need_prototypes and attended_grad is not None and teacher is not None and teacher_prototypes is not None:
        q = accumulable(teacher)
        for k, p in _probabilities(q, teacher_prototypes, bias, teacher_scale, teacher_lse, kept_teacher):
            dw[k].addmm_(p.T, attended_grad)
    return dh, dw


def _scores(rows: Tensor, prototypes: Tensor, bias: Tensor | None, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield the scores in base 2 of all rows with one tile of prototypes after another, in one buffer."""
    scaled = rows * (scale * LOG2E)
    width = len(prototypes) if is_kept(len(rows), len(prototypes)) else max(1, _AREA // len(rows))
    buffer = rows.new_empty(len(rows) * min(width, len(prototypes)))
    for start in range(0, len(prototypes), width):
        k = slice(start, min(start + width, len(prototypes)))
        tile = buffer[: len(rows) * (k.stop - start)].view(len(rows), -1)
        torch.mm(scaled, accumulable(prototypes[k]).T, out=tile)
        if bias is not None:
            parts = tile.view(len(bias), -1, tile.shape[1])
            parts += bias[:, None, k] * LOG2E
        yield k, tile


def _probabilities(
    rows: Tensor, prototypes: Tensor, bias: Tensor | None, scale: float, lse: Tensor, kept: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield softmax probabilities, tile by tile. They are read-only, because they may be the saved ones."""
    if kept.numel():
        yield slice(0, len(prototypes)), kept
        return
    shift = (lse * LOG2E)[:, None]
    for k, scores in _scores(rows, prototypes, bias, scale):
        yield k, scores.sub_(shift).clamp_min_(CLAMP).exp2_()


def _softmax_of_all(rows: Tensor, prototypes: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return all probabilities [N, K], and the log of the softmax's sum [N]."""
    (_, p), *_ = _scores(rows, prototypes, bias, scale)
    top = p.amax(1, keepdim=True)
    total = p.sub_(top).clamp_min_(CLAMP).exp2_().sum(1, keepdim=True)
    return p.div_(total), total.log2().add_(top).mul_(1 / LOG2E).squeeze(1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the softmax-weighted mean of the values per query [T, D], and the log of the softmax's sum [T]."""
    top = queries.new_full((len(queries), 1), -torch.inf)
    total = torch.zeros_like(top)
    out = queries.new_zeros(queries.shape)
    for k, scores in _scores(queries, keys, bias, scale):
        new = torch.maximum(top, scores.amax(1, keepdim=True))
        fade = (top - new).exp2_()
        p = scores.sub_(new).clamp_min_(CLAMP).exp2_()
        total.mul_(fade).add_(p.sum(1, keepdim=True))
        out.mul_(fade).addmm_(p, accumulable(values[k]))
        top = new
    return out.div_(total), total.log2_().add_(top).mul_(1 / LOG2E).squeeze(1)
