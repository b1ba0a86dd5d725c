"""BYOL (arXiv 2006.07733): regress the target network's projection of the other view."""

from __future__ import annotations

from torch import Tensor, nn

from .simsiam import SimSiamLoss


class BYOLLoss(nn.Module):
    """``mean |p0 - t1|^2 + mean |p1 - t0|^2`` of unit-norm rows (equations 2 and 3), in [0, 8].

    This equals ``4 - 2 cos(p0, t1) - 2 cos(p1, t0)``, which is 4 + 4 :class:`SimSiamLoss`. The targets get no
    gradient. Half precision is computed in fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cosines = SimSiamLoss()

    def forward(self, prediction0: Tensor, prediction1: Tensor, target0: Tensor, target1: Tensor) -> Tensor:
        """Return the loss of the online network's predictions and the target network's projections of two views.

        Each is [B, D], of any norm; the loss is a scalar. Raise ValueError if shapes, dtypes or devices differ.
        """
        loss: Tensor = 4 + 4 * self.cosines(prediction0, prediction1, target0, target1)
        return loss

    def views(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return twice the mean over all pairs of different views of predictions [S, B, D] and targets [T, B, D]."""
        return 4 + 4 * self.cosines.views(predictions, targets)
