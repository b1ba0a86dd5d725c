"""SimSiam (arXiv 2011.10566): predict the other view's projection, and stop the gradient there."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.checks import check_pair
from .negative_cosine import NegativeCosineSimilarity


class SimSiamLoss(nn.Module):
    """``-1/2 mean cos(p0, z1) - 1/2 mean cos(p1, z0)`` (equations 2 and 4), in [-1, 1].

    The projections get no gradient, so they may be passed as they are. Half precision is computed in fp32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cosine = NegativeCosineSimilarity()

    def forward(self, prediction0: Tensor, prediction1: Tensor, projection0: Tensor, projection1: Tensor) -> Tensor:
        """Loss of the predictions and projections of two views, each [B, D], of any norm; a scalar.

        Raises ValueError for shapes, types or devices that differ.
        """
        check_pair(prediction0, projection1, "prediction0", "projection1", same_rows=True)
        check_pair(prediction1, projection0, "prediction1", "projection0", same_rows=True)
        both = self.cosine(prediction0, projection1.detach()) + self.cosine(prediction1, projection0.detach())
        loss: Tensor = both / 2
        return loss
