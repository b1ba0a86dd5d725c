"""Sinkhorn-Knopp in potentials: plain matrix-vector products, which read the matrix and never rescale it.

    E_bk = exp((s_bk - max) / epsilon)                                      reads the scores once
    v_k = B / K / sum_b u_b E_bk,   u_b = 1 / sum_k E_bk v_k                    twice per iteration; u = 1 at first
    assignment = u E v,   center = max - epsilon log v, up to a constant

Three iterations read the scores 6 times, because the softmax gives the last u. Rescaling takes 37 passes. E must be
normal numbers of fp32. If the scores are further apart, reference.py uses log-sum-exps.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import Backend, choose_backend
from ..collectives import Group, ranks_of
from . import reference

_RANGE = 80.0  # nats: e^-80 is a normal number, and a sum of many inverses is finite


@torch.no_grad()
def sinkhorn_center(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    backend: Backend = "auto",
    group: Group | None = None,
) -> Tensor:
    """Return the column potential of the balanced assignment of B rows to K prototypes: ``center`` [K], fp32.

    ``softmax((scores - center) / epsilon)`` over K is the assignment itself (:func:`sinkhorn`). So a balanced target is
    a softmax with a key bias, and nothing of size B x K is rescaled. Each iteration first makes the columns sum to
    B / K, then the rows to 1 (SwAV, arXiv 2006.09882, section 3.1). With ``group`` the rows of all ranks are the batch,
    and K floats are reduced per iteration. The ranks may have different numbers of rows. Scores [B, K] may have any
    float type. In fp16, exp(1 / 0.05) alone would be infinite. The "eager" backend uses log-sum-exps (reference.py),
    and all others the matrix-vector products. Raises ValueError if scores are not [B, K], or if epsilon or iterations
    are invalid. The centres [T, K] of views' scores [T, B, K] take no more messages than one.
    """
    views = scores if scores.ndim == 3 else scores[None]
    potentials = _potentials(views, epsilon, iterations, backend, group)
    if potentials is None:
        center = partial(reference.sinkhorn_center, epsilon=epsilon, iterations=iterations, group=group)
        centers = torch.stack([center(view) for view in views])
    else:
        _, columns, tops = potentials
        centers = columns.log_().mul_(-epsilon).add_(tops[:, None])
    return centers if scores.ndim == 3 else centers[0]


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    backend: Backend = "auto",
    group: Group | None = None,
) -> Tensor:
    """Return the balanced soft assignment [B, K] of rows to prototypes, fp32.

    Rows sum to 1, and columns to nearly B / K. It has no gradient, because assignments are targets. For arguments and
    errors see :func:`sinkhorn_center`.
    """
    potentials = _potentials(scores[None], epsilon, iterations, backend, group)
    if potentials is None:
        return reference.sinkhorn(scores, epsilon=epsilon, iterations=iterations, group=group)
    e, columns = potentials[0][0], potentials[1][0]
    e *= columns
    return e.div_(e.sum(1, keepdim=True))


def _potentials(
    scores: Tensor, epsilon: float, iterations: int, backend: Backend, group: Group | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return E [T, B, K], v [T, K] and the largest score [T] of every view, or None for the reference.

    The reference is a choice, or needed because a view's scores are too far apart.
    """
    if scores.ndim != 3 or 0 in scores.shape or not scores.is_floating_point():
        raise ValueError(f"scores must be floating point [B, K], got {scores.dtype} {tuple(scores.shape[1:])}")
    if iterations < 1 or not epsilon > 0 or math.isinf(epsilon):
        raise ValueError(f"sinkhorn needs iterations >= 1 and a positive epsilon, got {iterations} and {epsilon}")
    if choose_backend(backend, scores) == "eager":
        return None
    scores = scores.float()
    least, most = scores.flatten(1).aminmax(dim=1)
    bounds = torch.stack([-least, most, scores.new_full(least.shape, scores.shape[1])])
    if group is not None:
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    depths, tops, (most_rows, *_) = bounds.tolist()
    if not all(depth + top <= _RANGE * epsilon for depth, top in zip(depths, tops, strict=True)):  # true for NaN, too
        return None
    scale = math.log2(math.e) / epsilon
    e = torch.add(scores.new_tensor([-top * scale for top in tops])[:, None, None], scores, alpha=scale).exp2_()
    rows, columns = e.new_ones(e.shape[:2]), e.new_empty(len(e), e.shape[2])
    # Its value cancels, but it must be the same on all ranks, which may have different numbers of rows.
    share = int(most_rows) * ranks_of(group) / e.shape[2]
    for iteration in range(iterations):
        for view, u, v in zip(e, rows, columns, strict=True):
            if iteration:
                torch.mv(view, v, out=u).reciprocal_()
            torch.mv(view.T, u, out=v)
        if group is not None:
            dist.all_reduce(columns, group=group)
        columns.reciprocal_().mul_(share)  # columns of 1 instead of B / K would make both potentials drift apart
    return e, columns, bounds[1]
