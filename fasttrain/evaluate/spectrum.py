"""How many directions the features use, without labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPECTRUM_ROWS = 25_600  # as in RankMe's paper: enough rows for the spectrum of any backbone


def spectrum_stride(count: int) -> int:
    """Every how manieth of ``count`` rows to take a spectrum of, so that they are evenly spaced and at most 25,600."""
    return math.ceil(count / SPECTRUM_ROWS)


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Effective rank exp(H(p)), p = singular values / their sum + eps, of features [N, D] (RankMe, arXiv 2210.02885).

    Between 1 (collapsed to a line) and min(N, D).
    """
    singular = torch.linalg.svdvals(features.double())
    p = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny) + eps
    return float((-(p * p.log()).sum()).exp())


def alpha_req(features: Tensor, first: int = 11, last: int = 50) -> float:
    """Rate alpha at which the covariance's eigenvalues of features [N, D] fall, lambda_j ~ j^-alpha.

    The slope of log lambda_j against log j by least squares over j = first .. last (alpha-ReQ, Agrawal et al. 2022:
    good features have alpha near 1). With fewer than ``last`` positive eigenvalues the range ends at the last of them;
    with fewer than twice ``first`` it begins at 1. NaN with fewer than three.
    """
    rows = features.double()
    singular = torch.linalg.svdvals(rows - rows.mean(0))
    floor = singular.max() * max(rows.shape) * torch.finfo(singular.dtype).eps
    eigenvalues = singular[singular > floor].square()
    count = len(eigenvalues)
    if count < 3:
        return math.nan
    begin = first if count >= 2 * first else 1
    ranks = torch.arange(begin, min(last, count) + 1, dtype=torch.float64, device=rows.device).log()
    values = eigenvalues[begin - 1 : last].log()
    ranks = ranks - ranks.mean()
    return -float((ranks * values).sum() / ranks.square().sum())


def lidar(views: Tensor, delta: float = 1e-4, eps: float = 1e-8) -> float:
    """Effective rank of linear discriminant analysis with images as classes: views [n, q, D] of n images (LiDAR).

    With the scatter Sb of the n class means (over n - 1) and the scatter within, Sw = mean + delta I (over n (q - 1)),
    lambda are the eigenvalues of Sw^-1/2 Sb Sw^-1/2, p = lambda / their sum + eps, and LiDAR = exp(H(p)), between 1 and
    min(n - 1, D) (arXiv 2312.04000). Raises ValueError for fewer than two images or two views.
    """
    n, q, dim = views.shape
    if n < 2 or q < 2:
        raise ValueError(f"LiDAR needs two images with two views each, got {n} with {q}")
    rows = views.double()
    means = rows.mean(1)
    between = torch.linalg.qr((means - means.mean(0)) / math.sqrt(n - 1), mode="r").R  # Sb = R' R
    inner = (rows - means[:, None]).flatten(0, 1)
    within = inner.T @ inner / (n * (q - 1)) + delta * torch.eye(dim, dtype=rows.dtype, device=rows.device)
    values, vectors = torch.linalg.eigh(within)
    eigenvalues = torch.linalg.svdvals(between @ vectors * values.rsqrt()).square()
    p = eigenvalues / eigenvalues.sum().clamp_min(torch.finfo(rows.dtype).tiny) + eps
    return float((-(p * p.log()).sum()).exp())
