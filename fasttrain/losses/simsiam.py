"""SimSiam (arXiv 2011.10566): predict the projection of the other view, without a gradient to the target."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.checks import check_pair
from .base import other_pairs, unit_views


class SimSiamLoss(nn.Module):
    """``-1/2 mean cos(p0, z1) - 1/2 mean cos(p1, z0)`` (equations 2 and 4), in [-1, 1].

    The projections get no gradient; there is no need to detach them. Half precision is computed in fp32.
    """

    def forward(self, prediction0: Tensor, prediction1: Tensor, projection0: Tensor, projection1: Tensor) -> Tensor:
        """Return the loss of the predictions and projections of two views, each [B, D], of any norm; a scalar.

        Raise ValueError if shapes, dtypes or devices differ.
        """
        check_pair(prediction0, projection1, "prediction0", "projection1", same_rows=True)
        check_pair(prediction1, projection0, "prediction1", "projection0", same_rows=True)
        check_pair(prediction0, prediction1, "prediction0", "prediction1", same_rows=True)
        return self.views(torch.stack([prediction0, prediction1]), torch.stack([projection0, projection1]))

    def views(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over all pairs of different views of predictions [S, B, D] and targets [T, B, D]."""
        pairs = other_pairs(unit_views(predictions, "predictions"), unit_views(targets.detach(), "targets"))
        return -torch.stack([(p * t).sum(1).mean() for p, t in pairs]).mean()
