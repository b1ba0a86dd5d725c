"""Similarity of two representations of the same images."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of features [N, D] and [N, E] of the same images (arXiv 1905.00414, equation 3).

        ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)        of centred columns

    It is 1 for features that are equal up to rotation and scale, and 0 for uncorrelated ones. Features without variance
    give 0. Raise ValueError for different numbers of rows.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must be features of the same images, got {len(x)} and {len(y)} rows")
    x, y = (rows.double() - rows.double().mean(0) for rows in (x, y))
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(y.T @ x).square() / own) if own > 0 else 0.0
