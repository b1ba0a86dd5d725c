"""Swapped prediction of balanced codes (SwAV, arXiv 2006.09882), with lightly 1.6's interface."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import prototype_terms, sinkhorn, sinkhorn_center
from ..kernels.backend import Backend
from ..kernels.checks import check_pair, check_positive, check_rows
from ..kernels.precision import at_least_single
from .base import CrossRank, gather_detached
from .views import count_pairs, cross_entropy_of_others, stack_views


class SwaVLoss(CrossRank):
    """Every view predicts the code of each *other* high-resolution view (arXiv 2006.09882, eq. 1 to 5), in nats.

        q_i = Sinkhorn(scores_i / sinkhorn_epsilon)                      no gradient, rows sum to 1, columns to B / K
        loss = mean over i, v != i and B of  -sum_k q_i,k log softmax(scores_v / temperature)_k

    where i runs over the high-resolution views and v over all views. Codes are balanced over the batch and the queue,
    if there is one; with ``sinkhorn_gather_distributed`` over the rows of all ranks.

    Drop-in for ``lightly.loss.SwaVLoss``, whose result has the shape (1,). Differences: the result, the codes and all
    sums are at least fp32. (In lightly, fp16 scores give NaN, because exp(1 / 0.05) is infinite.)

    Without iterations a code is its row's share of the exponentials of the whole batch, as in lightly: nothing is
    balanced. Raise ValueError for a temperature or epsilon that is not positive, or a negative number of iterations.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(sinkhorn_gather_distributed)
        check_positive(temperature, "temperature")
        check_positive(sinkhorn_epsilon, "sinkhorn_epsilon")
        if sinkhorn_iterations < 0:
            raise ValueError(f"sinkhorn_iterations must be at least 0, got {sinkhorn_iterations}")
        self.temperature = temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.backend = backend

    @property
    def sinkhorn_gather_distributed(self) -> bool:
        """Whether codes are balanced over the rows of all ranks."""
        return self.gather_distributed

    def forward(
        self,
        high_resolution_outputs: Sequence[Tensor],
        low_resolution_outputs: Sequence[Tensor],
        queue_outputs: Sequence[Tensor] | None = None,
        *,
        prototypes: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of views' scores [B, K], the similarities of projections and prototypes; shape (1,).

        ``queue_outputs`` are scores [Q, K] of past images, one tensor per high-resolution view. They only help to
        balance its code.

        With ``prototypes`` [K, D] all three arguments hold projections [B, D] instead, and the current prototypes score
        the queue. Loss and gradients are the same, and the predictions' scores are never computed. Sinkhorn still
        computes the scores [B + Q, K] of one high-resolution view at a time, and with several ranks of all of them.

        Raise ValueError for fewer than two views or no high-resolution view; views that differ in shape, dtype or
        device; a number of queues other than the high-resolution views (their floating dtype may differ); or prototypes
        without iterations.
        """
        self._compare_batches(*high_resolution_outputs[:1])
        high = stack_views(high_resolution_outputs, "high_resolution_outputs")
        views = high
        if len(low_resolution_outputs):
            low = stack_views(low_resolution_outputs, "low_resolution_outputs")
            check_pair(high[0], low[0], "high_resolution_outputs[0]", "low_resolution_outputs[0]", same_rows=True)
            views = torch.cat([high, low])
        count_pairs(high, views, "high_resolution_outputs", "all outputs")
        high = high.detach()
        queues = self._queues(high, queue_outputs)
        if prototypes is None:
            codes = [self._codes(torch.cat(rows))[: len(rows[0])] for rows in queues]
            return cross_entropy_of_others(torch.stack(codes), views, temp=self.temperature).view(1)
        if not self.sinkhorn_iterations:
            raise ValueError("sinkhorn_iterations: must be at least 1 with prototypes, got 0. Pass scores, or iterate.")
        check_rows(prototypes, "prototypes")
        if prototypes.shape[1] != high.shape[2]:
            raise ValueError(f"prototypes must be [K, D = {high.shape[2]}], got {tuple(prototypes.shape)}")
        centers = self.centers([torch.cat(rows) for rows in queues], prototypes)
        loss, _ = self.terms(views, high, prototypes, centers=centers, entropy=False)
        return loss.view(1)

    def terms(
        self, views: Tensor, codes: Tensor, prototypes: Tensor, *, centers: Tensor | None, entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and, with ``entropy``, H(mean assignment) of all views and ranks, in nats.

        ``views`` [S, B, D] predict the codes of their first T views, ``codes`` [T, B, D]. ``centers``
        [T, K] of :meth:`centers` balance the codes; with None a code is the softmax of its own scores.
        """
        if entropy:
            self._compare_batches(views)
        return prototype_terms(
            views,
            codes.detach(),
            prototypes,
            prototypes,
            student_temp=self.temperature,
            teacher_temp=self.sinkhorn_epsilon,
            center=centers,
            entropy=entropy,
            backend=self.backend,
            group=self.group,
            check_batches=False,
        )

    @torch.no_grad()
    def centers(self, rows: Iterable[Tensor], prototypes: Tensor) -> Tensor | None:
        """Return Sinkhorn's column potentials [T, K] over each high-resolution view's ``rows`` [B + Q, D].

        They turn the softmax of the scores into balanced codes. Return None without iterations.
        """
        if not self.sinkhorn_iterations:
            return None
        if self.group is None:
            return torch.stack([self._center(view, prototypes.detach()) for view in rows])
        return self._center(torch.stack(list(rows)), prototypes.detach())

    def _queues(self, high: Tensor, queues: Sequence[Tensor] | None) -> list[tuple[Tensor, ...]]:
        """Return the rows that balance each high-resolution view's code: the view's own first, then its queue's."""
        if queues is None:
            return [(view,) for view in high]
        if len(queues) != len(high):
            raise ValueError(
                f"queue_outputs: must have {len(high)} tensors, one per high-resolution view, got {len(queues)}"
            )
        for number, (view, queue) in enumerate(zip(high, queues, strict=True)):
            check_pair(view, queue.to(view.dtype), f"high_resolution_outputs[{number}]", f"queue_outputs[{number}]")
        return [(view, queue.detach()) for view, queue in zip(high, queues, strict=True)]

    def _codes(self, scores: Tensor) -> Tensor:
        return sinkhorn(scores, **self._sinkhorn()) if self.sinkhorn_iterations else self._shares(scores)

    def _shares(self, scores: Tensor) -> Tensor:
        """Return ``B exp(s_bk / epsilon) / sum_jl exp(s_jl / epsilon)``, over the rows of all ranks if gathered."""
        logits = at_least_single(scores) / self.sinkhorn_epsilon
        sums = gather_detached(logits.logsumexp((0, 1)).view(1), self.group)
        return (logits - sums.logsumexp(0) + math.log(len(scores) * len(sums))).exp()

    def _center(self, rows: Tensor, prototypes: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):  # bf16 scores divided by epsilon = 0.05 distort the codes
            rows = at_least_single(rows)
            scores = rows @ prototypes.to(rows.dtype).T
            return sinkhorn_center(scores, **self._sinkhorn())

    def _sinkhorn(self) -> dict[str, Any]:
        return {"epsilon": self.sinkhorn_epsilon, "iterations": self.sinkhorn_iterations, "group": self.group}
