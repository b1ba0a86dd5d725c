"""Entropy and reconstruction on the unit sphere, with the von Mises-Fisher kernel (arXiv 2307.10907, section 3)."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from .collectives import Group, first_row, gather_rows, mean_over_ranks
from .similarity.reference import row_logsumexp
from .vmf import log_vmf_normalizer

Estimator = Literal["average", "expectation"]
Normalizer = Literal["exact", "none"]


def vmf_entropy(
    z: Tensor,
    *,
    kappa: float = 10.0,
    estimator: Estimator = "average",
    leave_one_out: bool = False,
    normalizer: Normalizer = "exact",
    group: Group | None = None,
) -> Tensor:
    """Kernel density estimate of H(Z) in nats from unit-norm rows z [N, D].

        log p_i = log C_D(kappa) - log N + log sum_j exp(kappa <z_i, z_j>)
        "average":      H = -mean_i log p_i                            (Joe 1989)
        "expectation":  H = -sum_i w_i log p_i,  w = softmax(log p)    (plug-in)

    The sum includes j = i, as in the paper's code, so the estimate lies at most log N above that of N equal points;
    ``leave_one_out`` removes that term (and divides by N - 1). ``normalizer="none"`` leaves out log C_D(kappa), which
    has no gradient. With ``group`` the rows of all ranks are the batch.
    """
    everyone = gather_rows(z, group)
    lse = row_logsumexp(z, everyone, scale=kappa, exclude_self=leave_one_out, first_row=first_row(z, group))
    count = len(everyone) - 1 if leave_one_out else len(everyone)
    constant = math.log(count) - _log_normalizer(z.shape[1], kappa, normalizer)
    if estimator == "average":
        return constant - mean_over_ranks(lse.mean(), group)
    if estimator == "expectation":
        lse = gather_rows(lse, group)
        return constant - (lse.softmax(0) * lse).sum()
    raise ValueError(f"estimator must be 'average' or 'expectation', got {estimator!r}")


def vmf_reconstruction(
    z0: Tensor, z1: Tensor, *, kappa: float = 10.0, normalizer: Normalizer = "exact", group: Group | None = None
) -> Tensor:
    """``-E log q(z1 | z0) = -log C_D(kappa) - kappa mean_i <z0_i, z1_i>`` in nats, for unit-norm z0, z1 [N, D]."""
    cosine = mean_over_ranks((z0 * z1).sum(1).mean(), group)
    return -_log_normalizer(z0.shape[1], kappa, normalizer) - kappa * cosine


def _log_normalizer(dim: int, kappa: float, normalizer: Normalizer) -> float:
    return log_vmf_normalizer(dim, kappa) if normalizer == "exact" else 0.0
