"""Contrastive multiview coding (CMC, arXiv 1906.05849): InfoNCE summed over pairs of views, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, get_args

import torch
from torch import Tensor

from ..kernels import info_nce
from ..kernels.backend import Backend
from ..kernels.checks import check_pair, check_positive
from .base import Loss, unit_rows
from .info_nce import symmetric_info_nce
from .instance_bank import InstanceBank

Graph = Literal["full", "core"]


class CMCLoss(Loss):
    """CMC with the batch's other images as negatives, in nats.

        loss = sum over pairs {a, b} of  l(z_a, z_b) + l(z_b, z_a),   l = InfoNCE (section 3.2)

    ``graph="full"`` uses all pairs of views, ``graph="core"`` all pairs with view 0 (section 3.3). As in the paper, the
    directions are summed: two views give twice the value of ``InfoNCELoss(symmetric=True)``.

    With ``gather_distributed`` the negatives come from all ranks, and the mean is over this rank's rows. Raise
    ValueError for a temperature that is not positive or an unknown graph.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        gather_distributed: bool = False,
        *,
        graph: Graph = "full",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        check_positive(temperature, "temperature")
        _check_graph(graph)
        self.temperature = temperature
        self.graph = graph

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Return the loss of the projections of at least 2 views, each [B, D], of any norm; a scalar.

        Raise ValueError for fewer views, or for shapes or dtypes that differ.
        """
        self._compare_batches(*views[:1])
        z = _unit_views(views)
        group = self.group
        pairs = [
            symmetric_info_nce(z[a], z[b], temperature=self.temperature, backend=self.backend, group=group)
            for a, b in _pairs(len(z), self.graph)
        ]
        return 2 * torch.stack(pairs).sum()


class CMCMemoryLoss(Loss):
    """CMC against a bank of every image's past projections, one bank per view (section 3.4), in nats.

        l_i(z_a, bank_b) = log[exp(<z_a,i, m_b,i> / temperature) + sum_n exp(<z_a,i, m_b,n> / temperature)]
                           - <z_a,i, m_b,i> / temperature,   mean over the B rows
        loss = sum over pairs {a, b} of  l(z_a, bank_b) + l(z_b, bank_a)

    where n runs over ``negatives`` images, drawn once per step for the whole batch (the authors draw them per row).
    After the loss, if it requires a gradient, ``m_i <- normalize(momentum m_i + (1 - momentum) z_i)`` in every bank.
    The banks are in ``state_dict``.

    With ``gather_distributed`` the rows of all ranks enter every bank. Raise ValueError for a temperature that is not
    positive, an unknown graph, fewer than 2 views, no negatives, or invalid arguments of :class:`InstanceBank`.
    """

    def __init__(
        self,
        num_images: int,
        dim: int = 128,
        views: int = 2,
        temperature: float = 0.07,
        negatives: int = 16384,
        momentum: float = 0.5,
        gather_distributed: bool = False,
        *,
        graph: Graph = "full",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        check_positive(temperature, "temperature")
        _check_graph(graph)
        if views < 2 or negatives < 1:
            raise ValueError(f"CMC needs at least 2 views and 1 negative, got {views} and {negatives}")
        self.temperature = temperature
        self.graph = graph
        self.negatives = negatives
        self.memory = InstanceBank(num_images, dim, views, momentum, gather_distributed)
        self.memory.check_batches = False  # the loss compares them

    def forward(self, views: Sequence[Tensor], index: Tensor) -> Tensor:
        """Return the loss of the projections of all views, each [B, D], of any norm, of the images ``index`` [B].

        It is a scalar. Raise ValueError if the number of views is not the number of banks, or for shapes or dtypes
        that do not match.
        """
        if torch.is_grad_enabled() and any(view.requires_grad for view in views):
            self._compare_batches(index, *views[:1])
        z = _unit_views(views)
        if len(z) != len(self.memory.bank):
            raise ValueError(f"the memory holds {len(self.memory.bank)} views, got {len(z)}")
        if index.shape != z[0].shape[:1] or index.dtype != torch.long:
            raise ValueError(f"index must be int64 [{len(z[0])}], got {index.dtype} {tuple(index.shape)}")
        positives, negatives = self.memory(index).to(z[0]), self.memory.draw(self.negatives).to(z[0])
        directions = [
            info_nce(z[a], positives[b], negatives[b], temperature=self.temperature, backend=self.backend)
            for pair in _pairs(len(z), self.graph)
            for a, b in (pair, pair[::-1])
        ]
        loss = torch.stack(directions).sum()
        if loss.requires_grad:
            self.memory.update(index, z)
        return loss


def _check_graph(graph: str) -> None:
    if graph not in get_args(Graph):
        raise ValueError(f"graph must be 'full' or 'core', got {graph!r}")


def _unit_views(views: Sequence[Tensor]) -> list[Tensor]:
    if len(views) < 2:
        raise ValueError(f"CMC needs at least 2 views, got {len(views)}")
    for number, view in enumerate(views):
        check_pair(views[0], view, "view 0", f"view {number}", least_dim=2, same_rows=True)
    return [unit_rows(view, f"view {number}") for number, view in enumerate(views)]


def _pairs(views: int, graph: Graph) -> list[tuple[int, int]]:
    return [pair for pair in combinations(range(views), 2) if graph == "full" or pair[0] == 0]
