"""The contrastive losses of MoCo: against a queue (v1, v2), and within the batch (v3).

They share neither inputs nor state: v1 and v2 take one query and one key and own a queue; v3 takes two of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import info_nce, row_logsumexp
from ..kernels.backend import Backend
from ..kernels.checks import check_positive
from ..kernels.collectives import ranks_of
from ..kernels.contrastive import row_dots
from .base import Loss, gather_views, other_pairs, unit_pair, unit_views
from .memory_bank import MemoryBankModule


class MoCoLoss(Loss):
    """InfoNCE of queries against the momentum encoder's keys and a queue of past keys, in nats.

        l_i = -log exp(cos(q_i, k_i) / temperature) / [exp(cos(q_i, k_i) / temperature)
              + sum_m exp(cos(q_i, m) / temperature)],   m over the queue;   mean over the B rows

    MoCo v1 (arXiv 1911.05722, equation 1) uses temperature 0.07, v2 (arXiv 2003.04297) uses 0.2. Keys get no gradient.
    They are enqueued after the loss, if the query requires a gradient. The queue, ``memory_bank``, is in
    ``state_dict``.

    With ``gather_distributed`` the keys of all ranks are enqueued, as in the authors' code. The mean is over this
    rank's rows. Raise ValueError for a temperature that is not positive or a size that is not ``(num_keys, dim)``.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        memory_bank_size: Sequence[int] = (65536, 128),
        gather_distributed: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        check_positive(temperature, "temperature")
        self.temperature = temperature
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed, feature_dim_first=False)
        self.memory_bank.check_batches = False  # the loss compares them
        if not self.memory_bank.size[0]:
            raise ValueError("MoCoLoss needs a queue: pass memory_bank_size=(num_keys, dim)")

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Return the loss of ``query`` and ``key`` [B, D], of any norm; a scalar.

        Raise ValueError for shapes or dtypes that differ, or a D other than the queue's. Before keys are enqueued,
        raise it for a batch (of all ranks, if gathered) that does not divide the queue's length.
        """
        if query.requires_grad:
            self._compare_batches(query, key)
            self._check_length(len(key))
        loss = self.contrast(query, key, self.queue)
        if query.requires_grad:
            self._write(key)
        return loss

    @property
    def queue(self) -> Tensor:
        """A copy of the queue [num_keys, dim]: backward still reads it after the next keys are enqueued."""
        return self.memory_bank.bank.clone()

    def contrast(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        """Return the loss of one view's queries [B, D] against keys [B, D] and a queue. Enqueue nothing."""
        q, k = unit_pair(query, key.detach(), "query", "key")
        return info_nce(q, k, queue.to(q), temperature=self.temperature, backend=self.backend)

    def enqueue(self, key: Tensor) -> None:
        """Write the keys [B, D] over the oldest ones. If gathered, write all ranks' keys."""
        self._compare_batches(key)
        self._write(key)

    def _write(self, key: Tensor) -> None:
        self.memory_bank.enqueue(unit_pair(key.detach(), key.detach(), "key", "key")[0])

    def _check_length(self, rows: int) -> None:
        batch = rows * ranks_of(self.group)
        length = self.memory_bank.size[0]
        if length % batch:
            raise ValueError(
                f"memory_bank_size: must be a multiple of the batch, got {length} for a batch of {batch}. "
                "Drop the last smaller batch of an epoch, or change memory_bank_size."
            )


class MoCoV3Loss(Loss):
    """MoCo v3 (arXiv 2104.02057, algorithm 1): InfoNCE within the batch, in both directions, in nats.

        ctr(q, k) = 2 temperature * mean_i [log sum_j exp(cos(q_i, k_j) / temperature) - cos(q_i, k_i) / temperature]
        loss = ctr(query0, key1) + ctr(query1, key0)

    The method's learning rates assume the factor 2 temperature. Keys get no gradient. With ``gather_distributed``
    (which the authors always use) the keys come from all ranks; the mean is over this rank's rows. The default
    temperature is the authors' for ResNet-50; for ViTs it is 0.2. Raise ValueError if it is not positive.
    """

    def __init__(
        self, temperature: float = 1.0, gather_distributed: bool = False, *, backend: Backend = "auto"
    ) -> None:
        super().__init__(gather_distributed, backend)
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, query0: Tensor, query1: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
        """Return the loss of predictions and momentum projections of views 0 and 1, each [B, D], of any norm.

        It is a scalar. Raise ValueError if shapes or dtypes differ.
        """
        self._compare_batches(key0, key1)
        q0, k1 = unit_pair(query0, key1.detach(), "query0", "key1")
        q1, k0 = unit_pair(query1, key0.detach(), "query1", "key0")
        return self._contrast(q0, k1) + self._contrast(q1, k0)

    def views(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return twice the mean over all pairs of different views of queries [S, B, D] and keys [T, B, D].

        The keys of all ranks are gathered once.
        """
        self._compare_batches(keys)
        q, k = unit_views(queries, "queries"), unit_views(keys.detach(), "keys")
        pairs = other_pairs(q, k)
        if self.group is None:
            return 2 * torch.stack([self._contrast(*pair) for pair in pairs]).mean()
        columns = gather_views(k, self.group)
        lse = torch.stack([self._logsumexp(query, rows) for query, rows in other_pairs(q, columns)])
        positives = torch.stack([row_dots(query, key) for query, key in pairs]) / self.temperature
        return 4 * self.temperature * (lse - positives).mean()

    def _logsumexp(self, query: Tensor, keys: Tensor) -> Tensor:
        return row_logsumexp(query, keys, scale=1 / self.temperature, unit_norm=True, backend=self.backend)

    def _contrast(self, query: Tensor, keys: Tensor) -> Tensor:
        loss = info_nce(
            query, keys, temperature=self.temperature, backend=self.backend, group=self.group, check_batches=False
        )
        return 2 * self.temperature * loss
