"""VICReg (arXiv 2105.04906), with lightly 1.6's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import covariance_norms
from ..kernels.backend import Backend
from ..kernels.checks import check_pair
from ..kernels.collectives import mean_over_ranks, ranks_of
from ..kernels.precision import at_least_single
from .base import Loss


class VICRegTerms(NamedTuple):
    """The three terms of VICReg without their weights, scalars."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


class VICRegLoss(Loss):
    """``lambda invariance + mu variance + nu covariance`` of two views (arXiv 2105.04906, equation 6).

        invariance = mean_ij (a_ij - b_ij)^2
        variance   = 1/2 sum over the views of mean_j max(0, 1 - sqrt(Var_j + eps))
        covariance = sum over the views of (1 / D) sum_{j != k} Cov_jk^2,       both with N - 1

    Drop-in for ``lightly.loss.VICRegLoss``. Differences: rows are [N, D], the result and all sums are at least fp32,
    and no [D, D] matrix is stored if there are fewer rows than features.

    With ``gather_distributed`` variance and covariance are of the rows of all ranks, and the invariance of this rank's.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of two views [N, D]; a scalar.

        Raise ValueError if they differ in shape, dtype or device, or if all ranks together have fewer than two rows.
        """
        self._compare_batches(z_a, z_b)
        check_pair(z_a, z_b, "z_a", "z_b", same_rows=True)
        return self.weighted(self.terms(torch.stack([z_a, z_b]), [(0, 1)]))

    def weighted(self, terms: VICRegTerms) -> Tensor:
        """Return the loss of its terms."""
        invariance, variance, covariance = terms
        return self.lambda_param * invariance + self.mu_param * variance + self.nu_param * covariance

    def terms(self, views: Tensor, pairs: Sequence[tuple[int, int]]) -> VICRegTerms:
        """Return the terms of views [V, N, D], mean over ``pairs`` of views.

        Raise ValueError if all ranks together have fewer than two rows.
        """
        z, group = at_least_single(views), self.group
        count = z.shape[1] * ranks_of(group)
        if count < 2:
            raise ValueError(f"VICReg needs at least 2 rows, got views of shape {tuple(views.shape)}")
        centred = z - mean_over_ranks(z.mean(1), group)[:, None]
        squares, diagonal = covariance_norms(centred, backend=self.backend, group=group, check_batches=False)
        variances = diagonal / (count - 1)
        variance = (1 - (variances + self.eps).sqrt()).relu().mean(1)
        covariance = (squares / (count - 1) ** 2 - variances.square().sum(1)) / z.shape[2]
        first, second = (list(index) for index in zip(*pairs, strict=True))
        return VICRegTerms(
            (z[first] - z[second]).square().mean(),
            (variance[first] + variance[second]).mean() / 2,
            (covariance[first] + covariance[second]).mean(),
        )
