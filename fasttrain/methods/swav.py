"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (arXiv 2006.09882)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..flags import Count, Natural, NonNegative, Positive, Several, flag
from ..losses import SwaVLoss
from ..losses.base import gather_views
from ..models.heads import Prototypes, projection_mlp
from .base import Objective, PerImages, Step, Task, check_queue
from .bound import PrototypeMethod, in_product_dtype
from .branch import Branch, Network, width_of
from .registry import register


@dataclass(frozen=True)
class SwAVSettings:
    """SwAV's settings, as in its official code for ResNet-50 at batch 4096."""

    nmb_prototypes: Several = flag(3000, "number of prototypes")
    hidden_dim: Count = flag(2048, "width of the projection head's hidden layer")
    out_dim: Several = flag(128, "dimension of the projection")
    temperature: Positive = flag(0.1, "temperature of the predictions")
    epsilon: Positive = flag(0.05, "temperature of the codes (Sinkhorn's regularisation)")
    sinkhorn_iterations: Natural = flag(
        3, "iterations of Sinkhorn; 0: codes are not balanced (collapses without --entropy)"
    )
    queue_length: Natural = flag(0, "past projections per global view for Sinkhorn, over all ranks; 0: none")
    epoch_queue_starts: NonNegative = flag(15.0, "epoch from which the queue is used")
    freeze_prototypes_epochs: NonNegative = flag(1.0, "epochs during which the prototypes are frozen")


@register("swav")
class SwAV(PrototypeMethod):
    """Predict the other view's balanced code; the twin has the entropy in its objective and can omit Sinkhorn.

    Sinkhorn's equipartition keeps the entropy near its ceiling. So the twin is almost SwAV unless
    ``sinkhorn_iterations`` is 0.
    """

    Settings = SwAVSettings
    settings: SwAVSettings
    sized = MappingProxyType({"nmb_prototypes": PerImages(32, 64, 2048)})
    family = "clustering"
    zero_init_residual = False

    queue: Tensor
    queue_filled: Tensor

    def __init__(self, network: Network, settings: SwAVSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        head = projection_mlp((width_of(backbone), settings.hidden_dim, settings.out_dim))
        self.student = Branch(backbone, head, Prototypes(settings.out_dim, settings.nmb_prototypes))
        self.loss = SwaVLoss(settings.temperature, settings.sinkhorn_iterations, settings.epsilon)
        self.register_buffer("queue", torch.zeros(self.n_global, settings.queue_length, settings.out_dim))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.long))

    @classmethod
    def check(cls, settings: Any, batch: int) -> None:
        """Raise ValueError for a queue that holds no whole number of batches, or that Sinkhorn does not use."""
        check_queue(settings.queue_length, batch)
        if settings.queue_length and not settings.sinkhorn_iterations:
            raise ValueError(
                f"--queue_length: must be 0 with --sinkhorn_iterations 0, got {settings.queue_length}. "
                "Only Sinkhorn uses the queue."
            )

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the mean cross-entropy between codes of global views and predictions of the others, or the twin's."""
        z, prototypes = self.student(views), self.student.prototypes()
        codes = z[: self.n_global].detach()
        centers = self.loss.centers(self._balanced_rows(codes, step), prototypes)
        measure = self.entropy or step.measure
        reconstruction, entropy = self.loss.terms(
            *in_product_dtype(z, codes, prototypes), centers=centers, entropy=measure
        )
        return self.prototype_objective(reconstruction, entropy if measure else None, z, step)

    @torch.no_grad()
    def _balanced_rows(self, codes: Tensor, step: Step) -> Tensor:
        """Return the rows [T, B + Q, D] over which each global view's codes are balanced; then update the queue."""
        settings, rows = self.settings, codes
        if settings.queue_length and step.epoch >= settings.epoch_queue_starts:
            # As in the official code, the queue counts only once it is full. It holds projections, so that their
            # scores use the current prototypes.
            if int(self.queue_filled) >= settings.queue_length:
                rows = torch.cat([codes, self._share_of_queue()], dim=1)
            gathered = gather_views(codes, self.group)
            self.queue.copy_(torch.cat([gathered, self.queue], dim=1)[:, : settings.queue_length])
            self.queue_filled += gathered.shape[1]
        return rows

    def _share_of_queue(self) -> Tensor:
        """Return this rank's part: all ranks hold the whole queue, and Sinkhorn runs over the rows of all ranks."""
        if self.group is None:
            return self.queue
        return self.queue.chunk(self.group.size(), dim=1)[self.group.rank()]

    @property
    def frozen_prototype_epochs(self) -> float:
        """SwAV's ``freeze_prototypes_niters``, in epochs."""
        return self.settings.freeze_prototypes_epochs
