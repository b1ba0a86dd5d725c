"""The contrastive losses of MoCo: against a queue (v1, v2), and within the batch (v3).

Two classes, because they share neither inputs nor state: v1/v2 takes one query and one key and owns a queue; v3 takes
two of each and has none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..kernels import info_nce
from ..kernels.backend import Backend
from ..kernels.checks import check_positive
from .base import Loss, unit_pair
from .memory_bank import MemoryBankModule


class MoCoLoss(Loss):
    """InfoNCE of queries against the momentum encoder's keys and a queue of past keys, in nats.

        l_i = -log exp(cos(q_i, k_i) / temperature) / [exp(cos(q_i, k_i) / temperature)
              + sum_m exp(cos(q_i, m) / temperature)],   m over the queue;   mean over the B rows

    MoCo v1 (arXiv 1911.05722, equation 1, temperature 0.07) and v2 (arXiv 2003.04297, 0.2). Keys get no gradient. They
    are enqueued after the loss, if the query requires a gradient. The queue, ``memory_bank``, is in ``state_dict``.

    With ``gather_distributed`` the keys of all ranks are enqueued, as in the authors' code; the mean is over this
    rank's rows. Raises ValueError for a temperature that is not positive or a size that is not ``(num_keys, dim)``.
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
        if not self.memory_bank.size[0]:
            raise ValueError("MoCoLoss needs a queue: pass memory_bank_size=(num_keys, dim)")

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Loss of ``query`` and ``key`` [B, D], of any norm; a scalar.

        Raises ValueError for shapes or types that differ, a D that is not the queue's, or, where keys are to be
        enqueued, a batch (of all ranks, if gathered) that does not divide the queue's length.
        """
        q, k = unit_pair(query, key.detach(), "query", "key")
        if q.requires_grad:
            self._check_batch(len(k))
        _, queue = self.memory_bank(k)
        loss = info_nce(q, k, queue.to(q), temperature=self.temperature, backend=self.backend)
        if q.requires_grad:
            self.memory_bank.enqueue(k)
        return loss

    def _check_batch(self, rows: int) -> None:
        batch = rows * (1 if self.group is None else self.group.size())
        length = self.memory_bank.size[0]
        if length % batch:
            raise ValueError(
                f"the queue's length must be a multiple of the batch, got {length} and {batch}; "
                "drop an epoch's last smaller batch, or change memory_bank_size"
            )


class MoCoV3Loss(Loss):
    """MoCo v3 (arXiv 2104.02057, algorithm 1): InfoNCE within the batch, both views in turn, in nats.

        ctr(q, k) = 2 temperature * mean_i [log sum_j exp(cos(q_i, k_j) / temperature) - cos(q_i, k_i) / temperature]
        loss = ctr(query0, key1) + ctr(query1, key0)

    The factor 2 temperature belongs to the method's learning rates. Keys get no gradient. With ``gather_distributed``
    (which the authors always do) the keys are those of all ranks; the mean is over this rank's rows. The temperature
    is the authors' for ResNet-50; for ViT it is 0.2. Raises ValueError for one that is not positive.
    """

    def __init__(
        self, temperature: float = 1.0, gather_distributed: bool = False, *, backend: Backend = "auto"
    ) -> None:
        super().__init__(gather_distributed, backend)
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, query0: Tensor, query1: Tensor, key0: Tensor, key1: Tensor) -> Tensor:
        """Loss of predictions and momentum projections of views 0 and 1, each [B, D], of any norm; a scalar.

        Raises ValueError for shapes or types that differ.
        """
        return self._one_direction(query0, key1, "0", "1") + self._one_direction(query1, key0, "1", "0")

    def _one_direction(self, query: Tensor, key: Tensor, of_query: str, of_key: str) -> Tensor:
        q, k = unit_pair(query, key.detach(), f"query{of_query}", f"key{of_key}")
        loss = info_nce(q, k, temperature=self.temperature, backend=self.backend, group=self.group)
        return 2 * self.temperature * loss
