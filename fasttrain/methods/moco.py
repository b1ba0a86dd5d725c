"""MoCo v1 and v2: Momentum Contrast (arXiv 1911.05722), Improved Baselines (arXiv 2003.04297)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..flags import flag
from ..kernels import info_nce
from ..losses import MemoryBankModule
from ..losses.base import gather_detached
from ..models.batchnorm import broadcast_statistics
from ..models.heads import projection_mlp
from ..models.teacher import make_teacher
from . import bound
from .base import Branch, Method, Network, Objective, Step, Task, check_queue, slice_views, width_of


@dataclass(frozen=True)
class MoCoSettings(bound.SphereSettings):
    """MoCo's own settings, as in its official code for v2; v1 is --mlp false --temperature 0.07."""

    temperature: float = flag(0.2, "temperature of InfoNCE; 0.07 in v1", above=0)
    mlp: bool = flag(True, "a head of two layers (v2); false: of one (v1)")
    out_dim: int = flag(128, "dimension of the projection", least=1)
    queue_length: int = flag(
        65536, "keys of past batches that serve as negatives; a multiple of the global batch", least=1
    )
    bn_splits: int = flag(
        1, "parts of a rank's batch that BatchNorm sees apart, as the authors' eight GPUs do", least=1
    )
    momentum_teacher: float = flag(0.999, "the key encoder's momentum at the start", least=0, most=1)
    momentum_teacher_end: float = flag(0.999, "the key encoder's momentum at the end (cosine)", least=0, most=1)
    entropy_support: Literal["batch", "queue"] = flag("batch", "where the twin's kernels stand: batch or queue")


class MoCo(Method):
    """InfoNCE of queries against the momentum encoder's keys and a queue of past ones; the twin drops the classes.

    View 1 of the recipe is the key; all other views are queries. BatchNorm sees this rank's batch alone, and the keys'
    batch is shuffled over the ranks (section 3.3 of the paper), or else the batch's statistics give the key away.
    """

    Settings: ClassVar[type[MoCoSettings]] = MoCoSettings
    settings: MoCoSettings
    synchronised_batch_norm = False
    zero_init_residual = False

    def __init__(self, network: Network, settings: MoCoSettings, task: Task) -> None:
        super().__init__(settings, task)
        check_queue(settings.queue_length, task.batch)
        if settings.entropy_leave_one_out and settings.entropy_support == "queue":
            raise ValueError(
                "--entropy_leave_one_out: no row has a kernel in the queue; leave out --entropy_support queue"
            )
        backbone = network(task.views.channels)
        self.student = Branch(backbone, moco_head(width_of(backbone), settings))
        self.teacher = make_teacher(self.student)
        self.queue = MemoryBankModule((settings.queue_length, settings.out_dim), feature_dim_first=False)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Mean InfoNCE of the queries; the keys enter the queue afterwards."""
        key = self.keys(slice_views(views, 1, 2), step)
        queries = self.in_splits(self.student, [*slice_views(views, 0, 1), *slice_views(views, 2, 10**6)])
        queue = self.queue.bank.clone()  # backward still reads it when the keys have entered
        objective = self.objective(
            step,
            lambda: torch.stack([self.contrast(q, key, queue) for q in queries]).mean(),
            lambda: self.twin(queries, key, queue, step),
        )
        self.enqueue(key)
        return objective

    def enqueue(self, key: Tensor) -> None:
        """The keys of all ranks enter the queue of each."""
        self.queue.enqueue(gather_detached(key, self.group))

    def contrast(self, query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        """InfoNCE of one view's queries, mean over the rows (equation 1)."""
        return info_nce(query, key, queue, temperature=self.settings.temperature)

    def twin(self, queries: Sequence[Tensor] | Tensor, key: Tensor, queue: Tensor, step: Step) -> Objective:
        """The entropy-reconstruction objective: the queue stays only as support of the kernels, if at all."""
        s = self.settings
        pairs = [(query, key) for query in queries]
        support = queue if s.entropy_support == "queue" else None
        return bound.sphere(queries, pairs, s, group=self.group, support=support, measure=step.measure)

    @torch.no_grad()
    def keys(self, views: Sequence[Tensor], step: Step) -> Tensor:
        """The momentum encoder's projections of one view, encoded in an order that is shuffled over all ranks."""
        images = views[0][0]
        everyone = gather_detached(images, self.group)
        generator = torch.Generator().manual_seed(step.index)  # the same order on every rank
        order = torch.randperm(len(everyone), generator=generator).to(images.device)
        rank = 0 if self.group is None else self.group.rank()
        rows = slice(rank * len(images), (rank + 1) * len(images))
        encoded = self.in_splits(self.teacher, [everyone[order[rows]][None]])[0]
        restored: Tensor = gather_detached(encoded, self.group)[order.argsort()[rows]]
        return restored

    def in_splits(self, branch: Callable[[Sequence[Tensor]], Tensor], views: Sequence[Tensor]) -> Tensor:
        """Projections [V, B, D] by a branch that sees ``bn_splits`` parts of the batch one after the other."""
        splits = self.settings.bn_splits
        if splits == 1 or not self.training:
            return branch(views)
        parts = zip(*(group.chunk(splits, dim=1) for group in views), strict=True)
        return torch.cat([branch(part) for part in parts], dim=1)

    def end_step(self, step: Step) -> None:
        """The key encoder follows; all ranks take the first one's BatchNorm statistics, as DDP has it."""
        super().end_step(step)
        broadcast_statistics(self, self.group)


def moco_head(width: int, settings: MoCoSettings) -> nn.Module:
    """v2's two layers without BatchNorm, or v1's one."""
    dims = (width, width, settings.out_dim) if settings.mlp else (width, settings.out_dim)
    return projection_mlp(dims, batch_norm=False)
