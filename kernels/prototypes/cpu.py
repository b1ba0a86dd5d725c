"""The CPU path: tiles of prototypes, each met by all rows, and no logits.

    s_ik = scale_s <h_i, w_k>        P = softmax_k(s)       student rows h [R, D], prototypes w [K, D]
    t_jk = scale_t <q_j, v_k> + b_k  p = softmax_k(t)       teacher rows q [T, D], prototypes v [K, D], no gradient

    forward    lse_i, the log of the softmax's sum;   o_j = sum_k p_jk w_k, which is all of the teacher that the loss
               needs: attention with the teacher's rows as queries, its prototypes as keys and w as values;
               m_k = sum_i r_i P_ik, the weighted marginal;   e_i = sum_k P_ik s_ik
    backward   G_ik = P_ik (a_i + r_i g_k + c_i s_ik),   with a the gradient of lse, g that of m, c that of e, and
               a_i less r_i sum_k P_ik g_k and c_i (e_i - 1)
               dh = scale_s G w,   dw_k = scale_s G_k^T h + p_k^T do

Base 2 and exp2 as in similarity/cpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..similarity import cpu as similarity
from ..similarity.cpu import LOG2E

_AREA = 768 * 768
_CLAMP = -80.0  # 2^-80 is nothing beside 1, and no denormal

Terms = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
    """Lse [R], o [T, D], the teacher's lse [T], m [K] and e [R]; those not asked for are empty.

    bias is [V, K], a row for each of V equal parts of the teacher's rows; weights are r, and ask for m.
    """
    h, w = _accumulable(student), student_prototypes
    nothing = h.new_empty(0)
    lse, _ = similarity.pair_lse(
        h, _accumulable(w), None, None, scale=student_scale, excluded=None, unit_norm=False, columns=False
    )
    attended = teacher_lse = marginal = energies = nothing
    if teacher is not None and teacher_prototypes is not None:
        attended, teacher_lse = _attend(_accumulable(teacher), teacher_prototypes, w, bias, teacher_scale)
    if weights is not None or energy:
        marginal = nothing if weights is None else h.new_empty(len(w))
        energies = h.new_zeros(len(h) if energy else 0)
        for k, scores in _scores(h, w, None, student_scale):
            p = _softmax(scores, lse, keep=energy)
            if weights is not None:
                torch.mv(p.T, weights, out=marginal[k])
            if energy:
                energies += scores.mul_(p).sum(1)
        energies /= LOG2E
    return lse, attended, teacher_lse, marginal, energies


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
    lse_grad: Tensor | None,
    attended_grad: Tensor | None,
    marginal_grad: Tensor | None,
    energy_grad: Tensor | None,
    *,
    student_scale: float,
    teacher_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the student's rows [R, D] and prototypes [K, D], in the type of accumulation."""
    h, w = _accumulable(student), student_prototypes
    of_rows = torch.zeros_like(lse) if lse_grad is None else lse_grad
    of_columns = None
    if marginal_grad is not None and weights is not None:
        of_columns = marginal_grad
        mean_grad = torch.zeros_like(lse)
        for k, scores in _scores(h, w, None, student_scale):
            mean_grad += torch.mv(_softmax(scores, lse), marginal_grad[k])
        of_rows = of_rows - weights * mean_grad
    if energy_grad is not None:
        of_rows = of_rows + energy_grad * (1 - energies)
    dh, dw = torch.zeros_like(h), h.new_empty(w.shape)
    factors = None
    for k, scores in _scores(h, w, None, student_scale):
        p = _softmax(scores, lse, keep=energy_grad is not None)
        if factors is None:
            factors = torch.empty_like(p)  # the first tile is the largest
        factor = factors.view(-1)[: p.numel()].view_as(p)
        if of_columns is not None and weights is not None:
            torch.outer(weights, of_columns[k], out=factor)
            factor += of_rows[:, None]
        else:
            factor.copy_(of_rows[:, None].expand_as(p))
        if energy_grad is not None:
            factor += scores.mul_((energy_grad / LOG2E)[:, None])
        p *= factor
        dh.addmm_(p, _accumulable(w[k]), alpha=student_scale)
        torch.mm(p.T, h, out=dw[k]).mul_(student_scale)
    if attended_grad is not None and teacher is not None and teacher_prototypes is not None:
        q = _accumulable(teacher)
        for k, scores in _scores(q, teacher_prototypes, bias, teacher_scale):
            dw[k].addmm_(_softmax(scores, teacher_lse).T, attended_grad)
    return dh, dw


def _accumulable(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scores(rows: Tensor, prototypes: Tensor, bias: Tensor | None, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Scores in base 2 of all rows with a tile of prototypes at a time, in one buffer that the next overwrites."""
    scaled = rows * (scale * LOG2E)
    width = max(1, min(len(prototypes), _AREA // len(rows)))
    buffer = rows.new_empty(len(rows) * width)
    for start in range(0, len(prototypes), width):
        k = slice(start, min(start + width, len(prototypes)))
        tile = buffer[: len(rows) * (k.stop - start)].view(len(rows), -1)
        torch.mm(scaled, _accumulable(prototypes[k]).T, out=tile)
        if bias is not None:
            parts = tile.view(len(bias), -1, tile.shape[1])
            parts += bias[:, None, k] * LOG2E
        yield k, tile


def _softmax(scores: Tensor, lse: Tensor, *, keep: bool = False) -> Tensor:
    """Probabilities of scores in base 2, in their place unless they are to be kept."""
    shift = (lse * LOG2E)[:, None]
    exponent = scores - shift if keep else scores.sub_(shift)
    return exponent.clamp_min_(_CLAMP).exp2_()


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean of the values for each query [T, D], and log of the softmax's sum [T]."""
    top = queries.new_full((len(queries), 1), -torch.inf)
    total = torch.zeros_like(top)
    out = torch.zeros_like(queries)
    for k, scores in _scores(queries, keys, bias, scale):
        new = torch.maximum(top, scores.amax(1, keepdim=True))
        fade = (top - new).exp2_()
        p = scores.sub_(new).clamp_min_(_CLAMP).exp2_()
        total.mul_(fade).add_(p.sum(1, keepdim=True))
        out.mul_(fade).addmm_(p, _accumulable(values[k]))
        top = new
    return out.div_(total), total.log2_().add_(top).mul_(1 / LOG2E).squeeze(1)
