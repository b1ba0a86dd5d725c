"""KoLeo: the distance of every row to its nearest row (arXiv 1806.03198), with lightly 1.6's interface."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pairwise_distance

from ..kernels.backend import Backend
from ..kernels.checks import check_rows
from ..kernels.nearest.similarity import nearest_rows
from ..kernels.precision import at_least_single
from .base import Loss

_EQUAL = 1e-6
"""The distance below which two unit rows count as equal."""


class KoLeoLoss(Loss):
    """``-mean_i log(|z_i - z_n(i) + eps|_p + eps)`` over unit-norm rows z, n(i) the nearest other row of row i.

    It is the entropy estimate of Kozachenko and Leonenko in another unit, for p = 2:

        H = D (-loss) + log(N - 1) + log V_D + 0.5772        nats, V_D the volume of the unit ball of R^D

    where D is the dimension of the law of z: one less than the number of features for a law on the sphere.

    Drop-in for ``lightly.loss.KoLeoLoss``, whose code is DINOv2's. Differences: the result and all sums are at least
    fp32, no [N, N] matrix is stored, and unit rows closer than 1e-6 give no gradient. It would be rounding times 1e7.

    With ``gather_distributed`` the other rows come from all ranks, and the mean is over this rank's rows.
    """

    def __init__(
        self, p: float = 2, eps: float = 1e-8, *, gather_distributed: bool = False, backend: Backend = "auto"
    ) -> None:
        super().__init__(gather_distributed, backend)
        if not p > 0:
            raise ValueError(f"p must be positive, got {p}")
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.p = p
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss of rows x [N, D], of any norm; a scalar.

        Raise ValueError if x is not floating point [N, D], or if all ranks together have fewer than two rows.
        """
        self._compare_batches(x)
        check_rows(x, "x")
        z = normalize(at_least_single(x), dim=1, eps=self.eps)
        others, _ = nearest_rows(z, exclude_self=True, backend=self.backend, group=self.group)
        distances = pairwise_distance(z, others, self.p, self.eps)
        distances = torch.where(distances.detach() < _EQUAL, distances.detach(), distances)
        return -(distances + self.eps).log().mean()
