"""Kernel density entropies and reconstruction, on the unit sphere and in R^d (arXiv 2307.10907, section 3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .backend import Backend, choose_backend
from .checks import check_pair, check_positive, check_rows
from .collectives import Group, check_equal_batches, gather_rows, mean_over_ranks
from .contrastive import dot_of_all
from .similarity.logsumexp import row_logsumexp, view_logsumexps
from .vmf import log_vmf_normalizer, reference_log_vmf_normalizer

Estimator = Literal["average", "expectation"]
Normalizer = Literal["exact", "reference", "none"]


def vmf_entropy(
    z: Tensor,
    *,
    kappa: float = 10.0,
    estimator: Estimator = "average",
    leave_one_out: bool = False,
    normalizer: Normalizer = "exact",
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> Tensor:
    """Estimate H(Z) in nats from unit-norm rows z [N, D], with the von Mises-Fisher kernel.

        log p_i = log C_D(kappa) - log N + log sum_j exp(kappa <z_i, z_j>)
        "average":      H = -mean_i log p_i                            (Joe 1989)
        "expectation":  H = -sum_i w_i log p_i,  w = softmax(log p)    (plug-in)

    The sum includes j = i, as in the paper's code, so the estimate is at most log N above that for N equal points.
    ``leave_one_out`` removes this term and divides by N - 1. ``normalizer="none"`` omits log C_D(kappa), which has no
    gradient. ``"reference"`` uses the constant of the paper's code, to compare with its figures; it is wrong by 83 nats
    at D = 128. With ``group`` the rows of all ranks are the batch. The entropies [V] of views z [V, N, D] take no more
    messages than one.

    Raises ValueError if z is not [N, D >= 2] or [V, N, D >= 2], kappa is not above 0, or estimator or normalizer is
    unknown.
    """
    if check_batches:
        check_equal_batches("vmf_entropy", group, z)
    views = z if z.ndim == 3 else z[None]
    check_rows(views.flatten(0, 1), "z", least_dim=2)
    check_positive(kappa, "kappa")
    lse = view_logsumexps(views, scale=kappa, exclude_self=leave_one_out, unit_norm=True, backend=backend, group=group)
    constant = _log_others(views[0], leave_one_out, group) - _log_normalizer(views.shape[2], kappa, normalizer)
    if estimator == "average":
        mean = mean_over_ranks(lse.mean(1), group)
    elif estimator == "expectation":
        rows = gather_rows(lse.T, group)
        mean = (rows.softmax(0) * rows).sum(0)
    else:
        raise ValueError(f"estimator must be 'average' or 'expectation', got {estimator!r}")
    return constant - (mean if z.ndim == 3 else mean[0])


def vmf_reconstruction(
    z0: Tensor,
    z1: Tensor,
    *,
    kappa: float = 10.0,
    normalizer: Normalizer = "exact",
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> Tensor:
    """Return the reconstruction term in nats, for unit-norm z0, z1 [N, D].

        -E log q(z1 | z0) = -log C_D(kappa) - kappa mean_i <z0_i, z1_i>

    It is one sum of products on every ``backend``. Raises ValueError if shapes or types differ, D < 2, kappa is not
    above 0, or normalizer is unknown.
    """
    if check_batches:
        check_equal_batches("vmf_reconstruction", group, z0, z1)
    check_pair(z0, z1, "z0", "z1", least_dim=2, same_rows=True)
    check_positive(kappa, "kappa")
    choose_backend(backend, z0)
    cosine = mean_over_ranks(dot_of_all(z0, z1) / len(z0), group)
    return -_log_normalizer(z0.shape[1], kappa, normalizer) - kappa * cosine


def gaussian_entropy(
    z: Tensor,
    *,
    bandwidth: float,
    leave_one_out: bool = False,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> Tensor:
    """Estimate H(Z) in nats from rows z [N, D] in R^D, with a Gaussian kernel (Joe 1989).

        log p_i = -D/2 log(2 pi bandwidth^2) - log N + log sum_j exp(-|z_i - z_j|^2 / (2 bandwidth^2))
        H = -mean_i log p_i

    For ``leave_one_out`` and ``group`` see :func:`vmf_entropy`. H grows without bound with the scale of z. An objective
    that maximises H must fix the scale by other means. Raises ValueError if z is not [N, D], or if the bandwidth is not
    above 0.
    """
    if check_batches:
        check_equal_batches("gaussian_entropy", group, z)
    check_rows(z, "z")
    check_positive(bandwidth, "bandwidth")
    # Distances do not depend on the origin. With the mean as origin, the squares that cancel below are smallest.
    z = z if z.dtype == torch.float64 else z.float()
    z = z - mean_over_ranks(z.detach().mean(0), group)
    half_squares = (z * z).sum(1, keepdim=True) / 2
    # -|a - b|^2 / 2 = <a, b> - |a|^2 / 2 - |b|^2 / 2: the last term is an extra feature, the second follows the sum.
    keys = torch.cat([z, -half_squares], dim=1)
    queries = torch.cat([z, torch.ones_like(half_squares)], dim=1)
    scale = bandwidth**-2
    lse = row_logsumexp(
        queries,
        keys,
        scale=scale,
        exclude_self=leave_one_out,
        backend=backend,
        group=group,
        check_batches=False,
    )
    lse = lse - scale * half_squares.squeeze(1)
    constant = _log_others(z, leave_one_out, group) + z.shape[1] / 2 * math.log(2 * math.pi * bandwidth**2)
    return constant - mean_over_ranks(lse.mean(), group)


def _log_others(z: Tensor, leave_one_out: bool, group: Group | None) -> float:
    """Return the log of the number of kernels in the sum at each point. Raise ValueError if there is none."""
    count = z.shape[0] * (1 if group is None else torch.distributed.get_world_size(group)) - leave_one_out
    if count < 1:
        raise ValueError(f"leave_one_out needs at least 2 rows, got z of shape {tuple(z.shape)}")
    return math.log(count)


def _log_normalizer(dim: int, kappa: float, normalizer: Normalizer) -> float:
    if normalizer == "exact":
        return log_vmf_normalizer(dim, kappa)
    if normalizer == "reference":
        return reference_log_vmf_normalizer(dim, kappa)
    if normalizer == "none":
        return 0.0
    raise ValueError(f"normalizer must be 'exact', 'reference' or 'none', got {normalizer!r}")
