"""Sinkhorn-Knopp in potentials: the matrix is read, never rescaled, in plain matrix-vector products.

    E_bk = exp((s_bk - max) / epsilon)                                      1 pass over the scores
    v_k = B / K / sum_b u_b E_bk,   u_b = 1 / sum_k E_bk v_k                    2 an iteration, u = 1 at first
    assignment = u E v,   center = max - epsilon log v, up to a constant

Three iterations read the scores 6 times (the last u is not needed: the softmax finds it), where rescaling takes 37
passes. E must be normal numbers of fp32; where the scores are further apart, reference.py does it with log-sum-exps.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import Backend, choose_backend
from ..collectives import Group
from . import reference

_RANGE = 80.0  # nats: e^-80 is a normal number, and a sum of many of its inverses finite


@torch.no_grad()
def sinkhorn_center(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    backend: Backend = "auto",
    group: Group | None = None,
) -> Tensor:
    """The column potential of the balanced assignment of B rows to K prototypes: ``center`` [K], fp32.

    ``softmax((scores - center) / epsilon)`` over K is then the assignment itself (:func:`sinkhorn`), so that a
    balanced target is a softmax with a key bias and nothing of size B x K has to be rescaled. Each iteration asks first
    for equal prototypes (columns sum to B / K), then for rows that sum to 1 (SwAV, arXiv 2006.09882, section 3.1).
    With ``group`` the batch is that of all ranks; K floats are reduced an iteration. Scores [B, K] of any float dtype,
    fp16 included, where exp(1 / 0.05) would be infinite. ``backend`` "eager" takes log-sum-exps (reference.py), all
    others the same matrix-vector products. Raises ValueError for scores that are not [B, K], or settings that mean
    nothing.
    """
    found = _potentials(scores, epsilon, iterations, backend, group)
    if found is None:
        return reference.sinkhorn_center(scores, epsilon=epsilon, iterations=iterations, group=group)
    _, columns, top = found
    return columns.log_().mul_(-epsilon).add_(top)


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    backend: Backend = "auto",
    group: Group | None = None,
) -> Tensor:
    """Balanced soft assignment [B, K] of rows to prototypes; rows sum to 1, and columns to nearly B / K. fp32.

    It has no gradient: assignments are targets. Arguments and errors as :func:`sinkhorn_center`.
    """
    found = _potentials(scores, epsilon, iterations, backend, group)
    if found is None:
        return reference.sinkhorn(scores, epsilon=epsilon, iterations=iterations, group=group)
    e, columns, _ = found
    e *= columns
    return e.div_(e.sum(1, keepdim=True))


def _potentials(
    scores: Tensor, epsilon: float, iterations: int, backend: Backend, group: Group | None
) -> tuple[Tensor, Tensor, float] | None:
    """E, v and the largest score; or None where the reference is asked for, or the scores are too far apart for E."""
    if scores.ndim != 2 or 0 in scores.shape or not scores.is_floating_point():
        raise ValueError(f"scores must be floating point [B, K], got {scores.dtype} {tuple(scores.shape)}")
    if iterations < 1 or not epsilon > 0 or math.isinf(epsilon):
        raise ValueError(f"sinkhorn needs iterations >= 1 and a positive epsilon, got {iterations} and {epsilon}")
    if choose_backend(backend, scores) == "eager":
        return None
    scores = scores.float()
    least, most = scores.aminmax()
    bounds = torch.stack([-least, most])
    if group is not None:
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    apart, top = float(bounds.sum()), float(bounds[1])
    if not apart <= _RANGE * epsilon:  # NaN is a no
        return None
    scale = math.log2(math.e) / epsilon
    e = torch.add(scores.new_tensor(-top * scale), scores, alpha=scale).exp2_()
    rows, columns = e.new_ones(e.shape[0]), e.new_empty(e.shape[1])
    share = e.shape[0] * (1 if group is None else group.size()) / e.shape[1]
    for iteration in range(iterations):
        if iteration:
            torch.mv(e, columns, out=rows).reciprocal_()
        torch.mv(e.T, rows, out=columns)
        if group is not None:
            dist.all_reduce(columns, group=group)
        columns.reciprocal_().mul_(share)  # columns of B / K, as many as rows of 1: or both would drift apart
    return e, columns, top
