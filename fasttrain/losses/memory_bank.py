"""A first-in-first-out bank of past batches (MoCo, arXiv 1911.05722, section 3.2), with lightly 1.6's interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import CrossRank, gather_detached


class MemoryBankModule(CrossRank):
    """The latest ``num_features`` rows [num_features, dim], initialised with random rows of unit norm.

    ``size`` is ``(num_features, dim)``, or 0 for no bank. With ``gather_distributed`` every rank's bank receives the
    rows of all ranks. ``feature_dim_first`` returns the bank as [dim, num_features], else [num_features, dim].

    A batch is written from the pointer on. If it reaches the end, the rows beyond the end are lost and the pointer
    returns to 0. ``bank`` and ``bank_ptr`` are in ``state_dict``, so that a resumed run keeps its negatives. In lightly
    they are not: load its checkpoints with ``strict=False``.

    Raise ValueError for a negative size, a bare number above 0 (the dimension is missing), or a tuple other than
    ``(num_features, dim)``.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__(gather_distributed)
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(length < 0 for length in self.size):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if isinstance(size, int) and size > 0:
            raise ValueError(f"Memory bank size {size} lacks the feature dimension: pass ({size}, dim), or 0 for none")
        if self.size != (0,) and len(self.size) != 2:
            raise ValueError(f"Illegal memory bank size {size}: pass (num_features, dim), or 0 for none")
        self.feature_dim_first = feature_dim_first
        exists = self.size[0] > 0
        self.register_buffer("bank", normalize(torch.randn(self.size), dim=-1), persistent=exists)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=exists)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``output`` unchanged and the bank before the update. With ``update``, enqueue ``output`` [B, dim].

        The bank is a copy without gradient, or None if the size is 0. ``labels`` is ignored.
        """
        if self.size[0] == 0:
            return output, None
        # A copy, because backward still reads it after the enqueue.
        bank = self.bank.detach().clone()
        if update:
            self.enqueue(output)
        return output, bank.T if self.feature_dim_first else bank

    @torch.no_grad()
    def enqueue(self, batch: Tensor) -> None:
        """Write the rows ``batch`` [B, dim] over the oldest, without gradient.

        If gathered, raise ValueError on all ranks if their batches differ in shape or type.
        """
        self._compare_batches(batch)
        batch = gather_detached(batch, self.group).to(self.bank)
        size, count, pointer = self.size[0], len(batch), self.bank_ptr
        # Indices stay on the device, because reading the pointer would wait for it. Rows beyond the end write the last
        # row that fits once more.
        rows = torch.arange(count, device=batch.device).minimum(size - 1 - pointer)
        self.bank.index_copy_(0, pointer + rows, batch[rows])
        pointer.copy_((pointer + count) * (pointer + count < size))
