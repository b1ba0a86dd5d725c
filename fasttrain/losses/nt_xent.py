"""NT-Xent (SimCLR), and InfoNCE against a memory bank, with lightly 1.6's interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import info_nce, nt_xent
from ..kernels.backend import Backend
from .base import Loss, unit_pair, unit_views
from .memory_bank import MemoryBankModule


class NTXentLoss(Loss):
    """NT-Xent between two views (SimCLR, arXiv 2002.05709, equation 1), in nats.

    Without a memory bank, for z = the 2B rows of both views and j(i) the other view of the same image:

        l_i = log sum_{k != i} exp(cos(z_i, z_k) / temperature) - cos(z_i, z_j(i)) / temperature,   mean over 2B

    With ``memory_bank_size=(num_features, dim)`` only the rows of ``out0`` are anchors, and the bank's rows are their
    negatives (MoCo, arXiv 1911.05722, equation 1):

        l_i = log[exp(cos(out0_i, out1_i) / temperature) + sum_m exp(cos(out0_i, m) / temperature)]
              - cos(out0_i, out1_i) / temperature,                                               mean over B

    ``out1`` is enqueued after the loss, if ``out0`` requires a gradient. Detach ``out1`` if the method does.

    Drop-in for ``lightly.loss.NTXentLoss``. Differences: the result and all sums are at least fp32, the bank is in
    ``state_dict``, no [2B, 2B] matrix is stored, and a negative temperature is refused.

    With ``gather_distributed`` the other rows come from all ranks, the mean is over this rank's rows, and a memory bank
    receives every rank's rows. Raise ValueError for a temperature below 1e-8, or for a size other than 0 and
    ``(num_features, dim)``.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.memory_bank.check_batches = False  # the loss compares them
        self.temperature = temperature
        self.eps = 1e-8
        if not temperature >= self.eps:
            raise ValueError(f"Illegal temperature: {temperature} is not at least {self.eps}")

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Return the loss of the projections ``out0`` and ``out1`` [B, D], of any norm; a scalar.

        Raise ValueError if they differ in shape, dtype or device, or if D differs from the bank's.
        """
        if not self.memory_bank.size[0] or (out0.requires_grad and torch.is_grad_enabled()):
            self._compare_batches(out0, out1)
        out0, out1 = unit_pair(out0, out1, "out0", "out1")
        _, bank = self.memory_bank(out1)
        if bank is None:
            return nt_xent(
                out0,
                out1,
                temperature=self.temperature,
                backend=self.backend,
                group=self.group,
                check_batches=False,
            )
        loss = info_nce(out0, out1, bank.T.to(out0), temperature=self.temperature, backend=self.backend)
        if out0.requires_grad:
            self.memory_bank.enqueue(out1)
        return loss

    def pairs(self, views: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Return the mean loss over ``pairs`` of views [V, B, D], without a memory bank; a scalar."""
        self._compare_batches(views)
        z = unit_views(views, "views")
        losses = nt_xent(
            torch.stack([z[i] for i, _ in pairs]),
            torch.stack([z[j] for _, j in pairs]),
            temperature=self.temperature,
            backend=self.backend,
            group=self.group,
            check_batches=False,
        )
        return losses.mean()
