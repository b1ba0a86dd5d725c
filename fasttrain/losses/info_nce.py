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

    - As it stands, one direction, as info-nce-pytorch has it; the negatives are the batch's other keys, or those
      that ``forward`` is given.
    - ``symmetric``: the mean of this and the same with q and k exchanged (CLIP, arXiv 2103.00020, figure 3).
    - ``learnable_temperature``: the parameter ``logit_scale`` holds log(1 / temperature), and is set back to log 100
      whenever it is larger, as CLIP does. Hand ``parameters()`` to the optimizer, without weight decay.

    With ``gather_distributed`` the keys and negatives are those of all ranks, and the mean is over this rank's rows.
    Raises ValueError for a temperature that is not positive, or below 1/100 where it is learnt.
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
            raise ValueError(f"a learnt temperature is kept at 1/{_MAX_LOGIT_SCALE:.0f} or above, got {temperature}")
        self.symmetric = symmetric
        self._fixed = temperature
        scale = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable_temperature else None
        self.register_parameter("logit_scale", scale)

    @property
    def temperature(self) -> float | Tensor:
        """The temperature: a number, or a scalar with gradient where it is learnt."""
        return self._fixed if self.logit_scale is None else (-self.logit_scale).exp()

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Loss of ``query`` and ``positive_key`` [B, D], of any norm; a scalar.

        ``negative_keys`` [M, D] replace the batch's other keys: every query meets its own key and all M of them.
        Raises ValueError for shapes or types that differ, or for negative keys where the loss is symmetric.
        """
        q, k = unit_pair(query, positive_key, "query", "positive_key")
        if self.logit_scale is not None:
            with torch.no_grad():
                self.logit_scale.clamp_(max=math.log(_MAX_LOGIT_SCALE))
        if negative_keys is not None:
            if self.symmetric:
                raise ValueError("negative_keys serve one direction only; leave them out or set symmetric=False")
            check_pair(query, negative_keys, "query", "negative_keys")
            negatives = gather_rows(unit_rows(negative_keys, "negative_keys"), self.group)
            return info_nce(q, k, negatives, temperature=self.temperature, backend=self.backend)
        loss = symmetric_info_nce if self.symmetric else info_nce
        return loss(q, k, temperature=self.temperature, backend=self.backend, group=self.group)


def symmetric_info_nce(
    q: Tensor, k: Tensor, *, temperature: float | Tensor, backend: Backend = "auto", group: Group | None = None
) -> Tensor:
    """Mean of InfoNCE from q to k and from k to q, unit-norm rows [B, D]; on one process in one pass over the scores.

    Raises ValueError for shapes or types that differ, or a temperature not above 0.
    """
    if group is not None:
        one_way = partial(info_nce, temperature=temperature, backend=backend, group=group)
        return (one_way(q, k) + one_way(k, q)) / 2
    check_pair(q, k, "q", "k", same_rows=True)
    check_positive(temperature, "temperature")
    scale = 1 / temperature
    rows, columns = bidirectional_logsumexp(q, k, scale=scale, unit_norm=True, backend=backend)
    return (rows.mean() + columns.mean()) / 2 - scale * row_dots(q, k).mean()
