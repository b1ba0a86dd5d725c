"""Alignment and uniformity on the sphere (Wang and Isola, arXiv 2005.10242)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import row_logsumexp


def alignment(views: Tensor) -> float:
    """Return E||z1 - z2||^2, the mean squared distance over all pairs of views [n, q, D] of an image. 0 is best.

    Rows are normalised first. With s the sum of an image's q rows, the mean over its pairs is
    2 - 2 (||s||^2 - q) / (q (q - 1)). Raise ValueError for fewer than two views.
    """
    q = views.shape[1]
    if q < 2:
        raise ValueError(f"alignment needs two views per image, got {q}")
    sums = F.normalize(views.double(), dim=-1).sum(1)
    return float((2 - 2 * (sums.square().sum(-1) - q) / (q * (q - 1))).mean())


def uniformity(features: Tensor) -> float:
    """Return ``log E exp(-2 ||z - z'||^2)`` over all pairs of different rows [N, D]. Lower is more uniform.

    Rows are normalised first. As ``||z - z'||^2 = 2 - 2 cos``, this is a log-sum-exp of 4 cos - 4. It is computed in
    tiles, without an N x N matrix. Raise ValueError for fewer than two rows.
    """
    count = len(features)
    if count < 2:
        raise ValueError(f"uniformity needs two rows, got {count}")
    z = F.normalize(features.float(), dim=1)
    sums = row_logsumexp(z, z, scale=4.0, exclude_self=True)
    return float(torch.logsumexp(sums.double(), 0)) - 4 - math.log(count * (count - 1))
