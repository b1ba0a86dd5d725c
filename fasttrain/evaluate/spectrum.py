"""How many directions the features use."""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """Effective rank exp(H(p)), p = singular values / their sum + eps, of features [N, D] (RankMe, arXiv 2210.02885).

    Between 1 (collapsed to a line) and min(N, D).
    """
    singular = torch.linalg.svdvals(features.double())
    p = singular / singular.sum().clamp_min(torch.finfo(singular.dtype).tiny) + eps
    return float((-(p * p.log()).sum()).exp())
