"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (arXiv 2006.09882)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..flags import flag
from ..kernels import sinkhorn_center
from ..losses.base import gather_detached
from ..models.heads import Prototypes, projection_mlp
from . import bound
from .base import Branch, Method, Network, Objective, Step, Task, check_queue, width_of


@dataclass(frozen=True)
class SwAVSettings:
    """SwAV's own settings, as in its official code for ResNet-50 at batch 4096."""

    nmb_prototypes: int = flag(3000, "number of prototypes", least=2)
    hidden_dim: int = flag(2048, "width of the projection head's hidden layer", least=1)
    out_dim: int = flag(128, "dimension of the projection", least=1)
    temperature: float = flag(0.1, "temperature of the predictions", above=0)
    epsilon: float = flag(0.05, "temperature of the codes (Sinkhorn's regularisation)", above=0)
    sinkhorn_iterations: int = flag(
        3, "iterations of Sinkhorn; 0 for codes that are not balanced (collapses, unless with --entropy)", least=0
    )
    queue_length: int = flag(
        0, "projections of each global view kept for Sinkhorn, on all ranks together; 0 for none", least=0
    )
    epoch_queue_starts: float = flag(15.0, "epoch from which the queue is used", least=0)
    freeze_prototypes_epochs: float = flag(1.0, "epochs during which the prototypes stay fixed", least=0)


class SwAV(Method):
    """Predict the other view's balanced code; with its entropy in the objective, the twin can do without Sinkhorn.

    Sinkhorn's equipartition holds the entropy near its ceiling, so that the twin is SwAV, nearly, until
    ``sinkhorn_iterations`` is 0.
    """

    Settings = SwAVSettings
    settings: SwAVSettings
    zero_init_residual = False

    queue: Tensor
    queue_filled: Tensor

    def __init__(self, network: Network, settings: SwAVSettings, task: Task) -> None:
        super().__init__(settings, task)
        check_queue(settings.queue_length, task.batch)
        if settings.queue_length and not settings.sinkhorn_iterations:
            raise ValueError("the queue serves Sinkhorn alone: with --sinkhorn_iterations 0 give --queue_length 0")
        backbone = network(task.views.channels)
        head = projection_mlp((width_of(backbone), settings.hidden_dim, settings.out_dim))
        self.student = Branch(backbone, head, Prototypes(settings.out_dim, settings.nmb_prototypes))
        self.register_buffer("queue", torch.zeros(self.n_global, settings.queue_length, settings.out_dim))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.long))

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Mean over the global views' codes and all other views of the cross-entropy between code and prediction."""
        s = self.settings
        z, prototypes = self.student(views), self.student.prototypes()
        codes = z[: self.n_global].detach()
        return bound.discrete(
            z,
            codes,
            prototypes,
            prototypes,
            student_temp=s.temperature,
            teacher_temp=s.epsilon,
            center=self._sinkhorn_centers(codes, prototypes.detach(), step) if s.sinkhorn_iterations else None,
            group=self.group,
            twin=self.entropy,
            measure=step.measure,
        )

    @torch.no_grad()
    def _sinkhorn_centers(self, codes: Tensor, prototypes: Tensor, step: Step) -> Tensor:
        """The column potential of each global view's balanced assignment [T, K], over the batch and the queue."""
        s = self.settings
        rows = codes
        if s.queue_length and step.epoch >= s.epoch_queue_starts:
            # As in the official code, the queue counts only once it is full; it holds projections, so that their
            # scores are always against the prototypes of today.
            if int(self.queue_filled) >= s.queue_length:
                rows = torch.cat([codes, self._share_of_queue()], dim=1)
            everyone = torch.stack([gather_detached(view, self.group) for view in codes])
            self.queue.copy_(torch.cat([everyone, self.queue], dim=1)[:, : s.queue_length])
            self.queue_filled += everyone.shape[1]
        balance = partial(sinkhorn_center, epsilon=s.epsilon, iterations=s.sinkhorn_iterations, group=self.group)
        with torch.autocast(rows.device.type, enabled=False):  # scores in bf16, by an epsilon of 0.05, bend the codes
            return torch.stack([balance(view @ prototypes.T) for view in rows])

    def _share_of_queue(self) -> Tensor:
        """This rank's part: all ranks hold the whole queue, and Sinkhorn runs over the rows of all of them."""
        if self.group is None:
            return self.queue
        return self.queue.chunk(self.group.size(), dim=1)[self.group.rank()]

    @property
    def frozen_prototype_epochs(self) -> float:
        """SwAV's ``freeze_prototypes_niters``, in epochs."""
        return self.settings.freeze_prototypes_epochs
