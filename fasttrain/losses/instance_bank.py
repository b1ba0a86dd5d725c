"""A running average of every image's projection (CMC, arXiv 1906.05849, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import CrossRank, gather_detached, gather_views


class InstanceBank(CrossRank):
    """A row of unit norm for every view and image [views, num_images, dim], initialised at random.

        m_i <- normalize(momentum m_i + (1 - momentum) z_i)

    ``bank`` is in ``state_dict``. With ``gather_distributed`` every rank's bank receives the rows of all ranks. Raise
    ValueError for a size that is not positive or a momentum outside [0, 1).
    """

    bank: Tensor

    def __init__(
        self, num_images: int, dim: int, views: int = 2, momentum: float = 0.5, gather_distributed: bool = False
    ) -> None:
        super().__init__(gather_distributed)
        if min(num_images, dim, views) < 1:
            raise ValueError(f"num_images, dim and views must be above 0, got {num_images}, {dim} and {views}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self.register_buffer("bank", normalize(torch.randn(views, num_images, dim), dim=-1))

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows of the images ``index`` [B]: a copy [views, B, dim] without gradient."""
        return self.bank.index_select(1, index)

    def draw(self, count: int) -> Tensor:
        """Return the rows [views, count, dim] of images, drawn with replacement by torch's generator."""
        rows: Tensor = self(torch.randint(self.bank.shape[1], (count,), device=self.bank.device))
        return rows

    @torch.no_grad()
    def update(self, index: Tensor, views: Sequence[Tensor]) -> None:
        """Move the rows of the images ``index`` [B] towards ``views``, each [B, dim]. An image must not repeat.

        If gathered, raise ValueError on all ranks if their batches differ in shape or type.
        """
        self._compare_batches(index, *views[:1])
        index = gather_detached(index, self.group)
        z = gather_views(torch.stack(list(views)), self.group).to(self.bank)
        self.bank.index_copy_(1, index, normalize(z.lerp(self(index), self.momentum), dim=-1))
