"""MoCo v1 and v2: Momentum Contrast (arXiv 1911.05722), Improved Baselines (arXiv 2003.04297)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..flags import Count, Fraction, Positive, Several, flag
from ..kernels.collectives import permute_rows, ranks_of
from ..kernels.normalize import normalize_rows
from ..losses import MoCoLoss
from ..models.batchnorm import broadcast_statistics, has_batch_norm
from ..models.heads import projection_mlp
from ..models.teacher import make_teacher
from .base import Objective, PerImages, Step, Task, check_queue
from .bound import SphereMethod, SphereSettings
from .branch import Branch, Network, slice_views, width_of
from .registry import register


@dataclass(frozen=True)
class MoCoSettings(SphereSettings):
    """MoCo's settings, as in its official code for v2; v1 is ``--mlp false --temperature 0.07``."""

    temperature: Positive = flag(0.2, "temperature of InfoNCE; 0.07 in v1")
    mlp: bool = flag(True, "a head of two layers (v2); false: of one (v1)")
    out_dim: Several = flag(128, "dimension of the projection")
    queue_length: Count = flag(65536, "past keys that serve as negatives; a multiple of the global batch")
    bn_splits: Count = flag(1, "parts of a rank's batch that BatchNorm sees separately, as on the authors' eight GPUs")
    momentum_teacher: Fraction = flag(0.999, "momentum of the key encoder at the start")
    momentum_teacher_end: Fraction = flag(0.999, "momentum of the key encoder at the end (cosine schedule)")
    entropy_support: Literal["batch", "queue"] = flag("batch", "the centres of the twin's kernels: batch or queue")


@register("moco")
class MoCo(SphereMethod):
    """InfoNCE of queries against the momentum encoder's keys and a queue of past keys, or its twin.

    View 1 of the recipe is the key; all other views are queries. BatchNorm sees this rank's batch only, and the keys'
    batch is shuffled over the ranks (section 3.3 of the paper). Otherwise the batch's statistics reveal the key.
    """

    Settings: ClassVar[type[MoCoSettings]] = MoCoSettings
    settings: MoCoSettings
    sized = MappingProxyType({"queue_length": PerImages(4, 256, 65_536)})
    family = "contrastive"
    has_teacher = True
    synchronised_batch_norm = False
    zero_init_residual = False

    def __init__(self, network: Network, settings: MoCoSettings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        self.student = Branch(backbone, moco_head(width_of(backbone), settings))
        self.teacher = make_teacher(self.student)
        self._shuffles = has_batch_norm(self.teacher)
        self.loss = MoCoLoss(settings.temperature, (settings.queue_length, settings.out_dim))

    @classmethod
    def check(cls, settings: Any, batch: int) -> None:
        """Raise ValueError for a queue that holds no whole number of batches, or a useless combination."""
        super().check(settings, batch)
        check_queue(settings.queue_length, batch)
        if settings.entropy_leave_one_out and settings.entropy_support == "queue":
            raise ValueError(
                "--entropy_leave_one_out: has no effect with --entropy_support queue, because no row of the batch is "
                "in the queue. Leave one of them out."
            )

    @property
    def batch_divisor(self) -> int:
        """The parts of a rank's batch that BatchNorm sees separately."""
        return self.settings.bn_splits

    def warnings_for(self, images: int, batch: int) -> list[str]:
        """Warn if the batch is too small for the twin's entropy, unless its kernels are on the queue."""
        return [] if self.settings.entropy_support == "queue" else super().warnings_for(images, batch)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the mean InfoNCE of the queries, or the twin's objective; then enqueue the keys."""
        key = self.keys(slice_views(views, 1, 2), step)
        query_views = [*slice_views(views, 0, 1), *slice_views(views, 2)]
        queries = self.in_splits(self.student.projections, query_views)
        queue = self.loss.queue
        objective = self.objective(
            step,
            lambda: torch.stack([self.loss.contrast(query, key, queue) for query in queries]).mean(),
            lambda: self.twin(queries, key, queue, step),
        )
        self.enqueue(key)
        return objective

    def enqueue(self, key: Tensor) -> None:
        """Enqueue the keys of all ranks in the queue of each."""
        self.loss.enqueue(key)

    def twin(self, queries: Tensor, key: Tensor, queue: Tensor, step: Step) -> Objective:
        """Return the entropy-reconstruction objective. The queue is at most the support of the kernels."""
        z, target = normalize_rows(queries), normalize_rows(key)
        support = queue if self.settings.entropy_support == "queue" else None
        return self.sphere_objective(z, [(query, target) for query in z], step, support=support)

    @torch.no_grad()
    def keys(self, views: Sequence[Tensor], step: Step) -> Tensor:
        """Return the momentum encoder's projections of one view, encoded in an order shuffled over all ranks.

        Without BatchNorm the order would change nothing.
        """
        if not self._shuffles:
            keys: Tensor = self.teacher.projections(views)[0]
            return keys
        images = views[0][0]
        ranks = ranks_of(self.group)
        generator = torch.Generator().manual_seed(step.index)  # the same order on every rank
        order = torch.randperm(ranks * len(images), generator=generator)
        encoded = self.in_splits(self.teacher.projections, [permute_rows(images, order, self.group)[None]])[0]
        return permute_rows(encoded, order.argsort(), self.group)

    def in_splits(self, project: Callable[[Sequence[Tensor]], Tensor], views: Sequence[Tensor]) -> Tensor:
        """Return projections [V, B, D] of a function that sees ``bn_splits`` parts of the batch one after the other."""
        splits = self.settings.bn_splits
        if splits == 1 or not self.training:
            return project(views)
        parts = zip(*(group.chunk(splits, dim=1) for group in views), strict=True)
        return torch.cat([project(part) for part in parts], dim=1)

    def end_step(self, step: Step) -> None:
        """Update the key encoder. All ranks get rank 0's BatchNorm statistics, as under DDP."""
        super().end_step(step)
        broadcast_statistics(self, self.group)


def moco_head(width: int, settings: MoCoSettings) -> nn.Module:
    """Build v2's two layers without BatchNorm, or v1's one layer."""
    dims = (width, width, settings.out_dim) if settings.mlp else (width, settings.out_dim)
    return projection_mlp(dims, batch_norm=False)
