"""InfoNCE in one direction or both, with a fixed or a learnt temperature."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels import bidirectional_logsumexp, info_nce
from ..kernels.backend import Backend
from ..kernels.checks import check_pair, check_positive
from ..kernels.collectives import Group, gather_rows
from ..kernels.contrastive import row_dots
from .base import Loss, unit_pair, unit_rows

_MAX_LOGIT_SCALE = 100.0


class InfoNCELoss(Loss):
    """InfoNCE of queries against their keys (CPC, arXiv 1807.03748, equation 4), in nats.

        l_i = log sum_j exp(cos(q_i, k_j) / temperature) - cos(q_i, k_i) / temperature,   mean over the B rows

    - By default it has one direction, like info-nce-pytorch. The negatives are the batch's other keys, or the
      ``negative_keys`` of ``forward``.
    - ``symmetric``: the mean with the other direction, q and k exchanged (CLIP, arXiv 2103.00020, figure 3).
    - ``learnable_temperature``: the parameter ``logit_scale`` holds log(1 / temperature), and is clamped to log 100, as
      in CLIP. Give ``parameters()`` to the optimizer, without weight decay.

    With ``gather_distributed`` keys and negatives come from all ranks, and the mean is over this rank's rows. Raise
    ValueError for a temperature that is not positive, or a learnable one below 1/100.
    """

    logit_scale: nn.Parameter | None

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        symmetric: bool = False,
        learnable_temperature: bool = False,
        gather_distributed: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        check_positive(temperature, "temperature")
        if learnable_temperature and 1 / temperature > _MAX_LOGIT_SCALE:
            raise ValueError(f"temperature: must be at least 1/{_MAX_LOGIT_SCALE:.0f} if learnable, got {temperature}")
        self.symmetric = symmetric
        self._fixed = temperature
        scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable_temperature else None
        self.register_parameter("logit_scale", scale)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a number, or a scalar with gradient if it is learnable."""
        return self._fixed if self.logit_scale is None else (-self.logit_scale).exp()

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Return the loss of ``query`` and ``positive_key`` [B, D], of any norm; a scalar.

        ``negative_keys`` [M, D] replace the batch's other keys: every query is compared with its own key and all M.
        Raise ValueError for shapes or dtypes that differ, or for negative keys with a symmetric loss.
        """
        self._compare_batches(query, positive_key if negative_keys is None else negative_keys)
        q, k = unit_pair(query, positive_key, "query", "positive_key")
        if self.logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(_MAX_LOGIT_SCALE))
        if negative_keys is not None:
            if self.symmetric:
                raise ValueError("negative_keys: not supported with symmetric=True. Leave one of them out.")
            check_pair(query, negative_keys, "query", "negative_keys")
            negatives = gather_rows(unit_rows(negative_keys, "negative_keys"), self.group)
            return info_nce(q, k, negatives, temperature=self.temperature, backend=self.backend)
        if self.symmetric:
            return symmetric_info_nce(q, k, temperature=self.temperature, backend=self.backend, group=self.group)
        return info_nce(q, k, temperature=self.temperature, backend=self.backend, group=self.group, check_batches=False)


def symmetric_info_nce(
    q: Tensor, k: Tensor, *, temperature: float | Tensor, backend: Backend = "auto", group: Group | None = None
) -> Tensor:
    """Return the mean of InfoNCE from q to k and from k to q, unit-norm rows [B, D].

    One process computes both in one pass over the scores. All ranks must have equal batches. Raise ValueError for
    shapes or dtypes that differ, or a temperature that is not positive.
    """
    if group is not None:
        one_way = partial(info_nce, temperature=temperature, backend=backend, group=group, check_batches=False)
        return (one_way(q, k) + one_way(k, q)) / 2
    check_pair(q, k, "q", "k", same_rows=True)
    check_positive(temperature, "temperature")
    scale = 1 / temperature
    rows, columns = bidirectional_logsumexp(q, k, scale=scale, unit_norm=True, backend=backend)
    return (rows.mean() + columns.mean()) / 2 - scale * row_dots(q, k).mean()
