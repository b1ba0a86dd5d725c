"""Sinkhorn-Knopp over rows and prototypes, without the matrix of their scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_pair
from ..collectives import Group
from ..precision import at_least_single
from .reference import logsumexp_over_ranks

_CHUNK = 1 << 24
"""Scores that are computed at a time: 64 MiB in fp32."""


@torch.no_grad()
def prototype_sinkhorn_center(
    features: Tensor,
    prototypes: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: Group | None = None,
) -> Tensor:
    """Return :func:`sinkhorn_center` of the scores ``features prototypes^T``, [K], for rows [N, D] and [K, D].

    The assignment's potentials of the rows cancel in its softmax, so K numbers describe it:

        softmax((features prototypes^T - center) / epsilon)      rows sum to 1, columns to nearly N / K

    The scores are computed again in each iteration, some rows at a time: memory is O(N D + K D). At 3,763 patches and
    65,536 prototypes the whole matrix would take 0.9 GiB. With ``group`` the rows of all ranks are balanced; the ranks
    may have different numbers of rows, also none, and K floats are reduced per iteration. The result is fp32, or fp64
    for fp64 features. Raises ValueError if shapes, epsilon or iterations do not fit.
    """
    check_pair(features, prototypes, "features", "prototypes", least_rows=0)
    if iterations < 1 or not epsilon > 0 or math.isinf(epsilon):
        raise ValueError(f"sinkhorn needs iterations >= 1 and a positive epsilon, got {iterations} and {epsilon}")
    with torch.autocast(features.device.type, enabled=False):  # bf16 scores divided by epsilon distort the assignment
        rows = at_least_single(features)
        columns = (prototypes.to(rows.dtype) / epsilon).T.contiguous()
        potential = rows.new_zeros(len(prototypes))
        for iteration in range(iterations):
            total = torch.full_like(potential, -torch.inf)
            for chunk in torch.split(rows, max(_CHUNK // len(prototypes), 1)):
                logits = chunk @ columns
                if iteration:
                    logits -= (logits + potential).logsumexp(1, keepdim=True)
                if len(logits):
                    total = torch.logaddexp(total, logits.logsumexp(0))
            # Without any row, every potential is as good as another.
            total = logsumexp_over_ranks(total, group)
            potential = torch.where(total == -torch.inf, 0, -total)
        return -epsilon * potential
