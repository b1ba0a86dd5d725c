"""Barlow Twins (arXiv 2103.03230), with lightly 1.6's interface."""

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

_EPS = 1e-5  # of torch's BatchNorm


class BarlowTerms(NamedTuple):
    """The two terms of Barlow Twins without their weight, scalars."""

    invariance: Tensor
    redundancy: Tensor


class BarlowTwinsLoss(Loss):
    """``sum_j (1 - C_jj)^2 + lambda sum_{j != k} C_jk^2`` of two views (arXiv 2103.03230, equation 1).

    C is their cross-correlation over the batch, ``a^T b / N``, of features with mean 0 and standard deviation 1.

    Drop-in for ``lightly.loss.BarlowTwinsLoss``. Differences: the result and all sums are at least fp32, and no [D, D]
    matrix is stored if there are fewer rows than features. With ``gather_distributed`` the means and deviations are of
    the rows of all ranks too, as in the authors' code. lightly's are of each rank's rows.
    """

    def __init__(
        self, lambda_param: float = 5e-3, gather_distributed: bool = False, *, backend: Backend = "auto"
    ) -> None:
        super().__init__(gather_distributed, backend)
        self.lambda_param = lambda_param

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """Return the loss of two views [N, D]; a scalar.

        Raise ValueError if they differ in shape, dtype or device, or if all ranks together have fewer than two rows.
        """
        self._compare_batches(z_a, z_b)
        check_pair(z_a, z_b, "z_a", "z_b", same_rows=True)
        return self.weighted(self.terms(torch.stack([z_a, z_b]), [(0, 1)]))

    def weighted(self, terms: BarlowTerms) -> Tensor:
        """Return the loss of its terms."""
        return terms.invariance + self.lambda_param * terms.redundancy

    def terms(self, views: Tensor, pairs: Sequence[tuple[int, int]]) -> BarlowTerms:
        """Return the terms of views [V, N, D], mean over ``pairs`` of views.

        Raise ValueError if all ranks together have fewer than two rows.
        """
        z, group = at_least_single(views), self.group
        count = z.shape[1] * ranks_of(group)
        if count < 2:
            raise ValueError(f"Barlow Twins needs at least 2 rows, got views of shape {tuple(views.shape)}")
        centred = z - mean_over_ranks(z.mean(1), group)[:, None]
        variances = mean_over_ranks(centred.square().mean(1), group)
        unit = centred * (variances + _EPS).rsqrt()[:, None]
        first, second = (list(index) for index in zip(*pairs, strict=True))
        squares, diagonal = covariance_norms(
            unit[first], unit[second], backend=self.backend, group=group, check_batches=False
        )
        own = diagonal / count
        redundancy = squares / count**2 - own.square().sum(1)
        return BarlowTerms((1 - own).square().sum(1).mean(), redundancy.mean())
