"""Negative cosine similarity (SimSiam, arXiv 2011.10566, equation 1), with lightly 1.6's interface."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..kernels.precision import at_least_single


class NegativeCosineSimilarity(nn.Module):
    """``-mean cos(x0, x1)`` along ``dim``, in [-1, 1]; norms below ``eps`` count as ``eps``.

    No gradient is stopped: detach the target yourself, as SimSiam and BYOL do. Half precision is computed in fp32.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """Return the mean over all other dimensions of two tensors that broadcast to one shape; a scalar."""
        return -cosine_similarity(at_least_single(x0), at_least_single(x1), self.dim, self.eps).mean()
