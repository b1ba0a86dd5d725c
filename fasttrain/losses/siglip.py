"""SigLIP: the sigmoid loss of all pairs, with a learnt scale and bias (arXiv 2303.15343)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..kernels import siglip
from ..kernels.backend import Backend
from ..kernels.checks import check_finite, check_positive
from .base import Loss, unit_pair


class SigLIPLoss(Loss):
    """The sigmoid loss of images and texts, or of two views (SigLIP, arXiv 2303.15343, section 3.2), in nats.

        l = -(1 / B) sum_ij log sigmoid(l_ij (scale cos(x_i, y_j) + bias)),     l_ij = 1 for i = j, else -1

    The parameters ``logit_scale``, which holds log scale, and ``logit_bias`` start at the paper's values. Give
    ``parameters()`` to the optimizer, without weight decay.

    With ``gather_distributed`` the rows y come from all ranks, and the mean is over this rank's rows x. Raise
    ValueError for a scale that is not positive, or a bias that is not finite.
    """

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        *,
        gather_distributed: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        check_positive(scale, "scale")
        check_finite(bias, "bias")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of x and y [B, D] of any norm, where y_i belongs to x_i; a scalar.

        Raise ValueError if they differ in shape, dtype or device.
        """
        self._compare_batches(x, y)
        x, y = unit_pair(x, y, "x", "y")
        return siglip(
            x,
            y,
            scale=self.logit_scale.exp(),
            bias=self.logit_bias,
            backend=self.backend,
            group=self.group,
            check_batches=False,
        )
