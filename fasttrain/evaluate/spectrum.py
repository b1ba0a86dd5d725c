"""Spectra of features: the number of directions that they use. No labels are needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPECTRUM_ROWS = 25_600  # as in RankMe's paper: enough rows for any backbone


def spectrum_stride(count: int) -> int:
    """Return the step that selects at most 25,600 evenly spaced rows of ``count``."""
    return math.ceil(count / SPECTRUM_ROWS)


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Return RankMe (arXiv 2210.02885) of features [N, D]: exp(H(p)) with p = singular values / their sum + eps.

    It is between 1 (collapse to a line) and min(N, D).
    """
    singular = torch.linalg.svdvals(features.double())
    p = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny) + eps
    return float((-(p * p.log()).sum()).exp())


def alpha_req(features: Tensor, first: int = 11, last: int = 50) -> float:
    """Return alpha-ReQ of features [N, D]: the alpha of the covariance's eigenvalues lambda_j ~ j^-alpha.

    It is the least-squares slope of log lambda_j over log j for j = first .. last (Agrawal et al. 2022: good features
    have alpha near 1). With fewer than ``last`` positive eigenvalues, the range ends at the last positive one. With
    fewer than twice ``first``, it begins at 1. With fewer than three, the result is NaN.
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
    """Return LiDAR (arXiv 2312.04000): the effective rank of LDA with images as classes, from views [n, q, D].

    Sb is the scatter of the n class means (over n - 1), and Sw the scatter within classes (over n (q - 1)) + delta I.
    With lambda the eigenvalues of Sw^-1/2 Sb Sw^-1/2 and p = lambda / their sum + eps, LiDAR is exp(H(p)), between 1
    and min(n - 1, D). Raise ValueError for fewer than two images or two views.
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
