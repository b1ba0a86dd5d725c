"""The interface of a method: views in, loss and bound out.

A method knows views and networks. It does not know ranks (it hands ``self.group`` to the reductions) nor steps (the
engine calls ``forward``, then steps the optimizer, then calls ``end_step``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.collectives import Group
from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single
from ..losses import Bound as Bound
from ..models.heads import Prototypes
from ..models.teacher import ema_update
from ..optim.schedules import cosine
from ..pipelines.views.recipe import ViewRecipe

Network = Callable[[int], nn.Module]
"""Makes a backbone for so many input channels; its ``num_features`` is the width of what it returns."""


@dataclass(frozen=True)
class Task:
    """What a method is built for: the objective, the views, and how many images there are and come in a batch."""

    entropy: bool
    """Whether the entropy-reconstruction bound takes the place of the method's own objective."""
    views: ViewRecipe
    images: int
    batch: int
    """Images of a micro-batch, all ranks together."""


@dataclass(frozen=True)
class Step:
    """Where the run is: ``index`` of ``total`` optimizer steps, ``per_epoch`` of them an epoch.

    ``measure`` asks for the bound even if the objective does not need it.
    """

    index: int
    total: int
    per_epoch: int
    measure: bool = True

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the one under way."""
        return self.index / self.per_epoch


class Objective(NamedTuple):
    """What a forward pass returns: the scalar to minimise and, where they were measured, the bound and its variable.

    A tuple, since DeepSpeed looks for the tensors of tuples only, on which it hooks what comes before backward.
    """

    loss: Tensor
    bound: Bound | None = None
    projections: Tensor | None = None
    """The rows [N, D], without gradient, of which the bound speaks: a collapse shows in them first."""
    terms: Mapping[str, Tensor] = MappingProxyType({})
    """``entropy`` and ``reconstruction``, without gradient, where the loss is made of them."""


class Branch(nn.Module):
    """A backbone with its projection head and, for the methods that have them, prototypes.

    BatchNorm sees all views of a resolution at once in the backbone, and all views in the head; with ``views_apart`` it
    sees one view at a time, as in the official code of some methods.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        prototypes: Prototypes | None = None,
        *,
        views_apart: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.views_apart = views_apart
        if prototypes is not None:
            self.prototypes = prototypes

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Project views grouped by resolution, each [V_g, B, C, H, W], to unit-norm rows [V, B, D] in fp32."""
        return normalize_rows(self.projections(views))

    def projections(self, views: Sequence[Tensor]) -> Tensor:
        """The projections [V, B, D] as the head returns them, in fp32."""
        if self.views_apart:
            return torch.cat([self._project([view[None]]) for group in views for view in group])
        return self._project(views)

    def _project(self, views: Sequence[Tensor]) -> Tensor:
        """One backbone pass a resolution, one pass of the head over all."""
        batch = views[0].shape[1]
        features = torch.cat([self.backbone(group.flatten(0, 1)) for group in views])
        projected = at_least_single(self.head(features))
        return projected.view(-1, batch, projected.shape[1])


def slice_views(views: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """The views ``start`` to ``stop - 1``, still grouped by resolution."""
    chosen: list[Tensor] = []
    for group in views:
        part = group[max(start, 0) : max(stop, 0)]
        if len(part):
            chosen.append(part)
        start, stop = start - len(group), stop - len(group)
    return chosen


def unit_predictions(predictor: nn.Module, projections: Tensor) -> Tensor:
    """The predictor's outputs for projections [V, B, D], one view at a time, of unit norm, in fp32."""
    predicted = at_least_single(torch.stack([predictor(view) for view in projections]))
    return normalize_rows(predicted)


def other_pairs(queries: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every view of ``queries`` [S, B, D] with every other one of ``targets`` [T, B, D]; view i of both is the same."""
    return [(q, t) for j, t in enumerate(targets) for i, q in enumerate(queries) if i != j]


class Method(nn.Module):
    """One paper. Subclasses set ``Settings``, build ``student`` (and ``teacher``), define ``forward``.

    Settings with a teacher have ``momentum_teacher`` and ``momentum_teacher_end``. Everything a run must not forget is
    a parameter or a buffer.
    """

    Settings: ClassVar[type[Any]]
    """Frozen dataclass of the method's own flags, with the paper's values."""
    global_views_needed: int = 2
    synchronised_batch_norm: ClassVar[bool] = True
    """Whether BatchNorm sees the batch of all ranks; MoCo's must not (it would tell keys from the queue)."""
    zero_init_residual: ClassVar[bool] = True
    """Whether a ResNet's blocks begin as the identity, 0 the gamma of their last BatchNorm; as the authors have it."""
    constant_lr_modules: frozenset[str] = frozenset()
    """Parts whose learning rate does not decay."""

    student: Any
    """The :class:`Branch` that is trained, or what a method has in its place."""
    teacher: Any
    """The branch that follows the student, or None."""
    image_memories: Mapping[str, int] = MappingProxyType({})
    """Buffers with a row for every image, and along which dimension: a step writes those of its batch, no others."""

    def __init__(self, settings: Any, task: Task) -> None:
        super().__init__()
        self.teacher = None
        if task.views.n_global < self.global_views_needed:
            raise ValueError(
                f"this method needs {self.global_views_needed} global views, the recipe has {task.views.n_global}"
            )
        self.settings = settings
        self.entropy = task.entropy
        self.n_global = task.views.n_global
        self.group: Group | None = None

    @classmethod
    def encoder_channels(cls, views: ViewRecipe) -> tuple[int, ...]:
        """Input channels of the backbone's encoders, of which all methods but CMC have one."""
        return (views.channels,)

    @abstractmethod
    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """The objective of one batch: views grouped by resolution, global ones first; numbers of the images [B]."""

    def objective(self, step: Step, loss: Callable[[], Tensor], twin: Callable[[], Objective]) -> Objective:
        """The twin's objective; or the method's own with, where it is measured, the twin's bound without gradient."""
        if self.entropy:
            return twin()
        own = loss()
        if not step.measure:
            return Objective(own)
        with torch.no_grad():
            return twin()._replace(loss=own)

    @property
    def needs_first_pass(self) -> bool:
        """Whether every image is to be shown to :meth:`first_pass` before the first step."""
        return False

    def first_pass(self, views: Sequence[Tensor], indices: Tensor) -> None:
        """See a batch before training starts, without gradient."""

    def start_epoch(self) -> None:
        """Called before the first step of every epoch, with torch's generator in the same state on all ranks."""

    def end_step(self, step: Step) -> None:
        """Called after the optimizer's step: the teacher follows the student."""
        momentum = self.momentum(step)
        if self.teacher is not None and momentum is not None:
            ema_update(self.teacher, self.student, momentum)

    def momentum(self, step: Step) -> float | None:
        """The teacher's momentum at this step, a cosine from its start to its end; None without a teacher."""
        if self.teacher is None:
            return None
        return cosine(step.index, step.total, self.settings.momentum_teacher, self.settings.momentum_teacher_end)

    @property
    def frozen_prototype_epochs(self) -> float:
        """For how many epochs the prototypes' learning rate stays 0."""
        return 0

    @property
    def backbone(self) -> nn.Module:
        """The network whose features are evaluated and exported: the teacher's where there is one."""
        branch = self.student if self.teacher is None else self.teacher
        backbone: nn.Module = branch.backbone
        return backbone


def check_queue(length: int, batch: int) -> None:
    """Raise ValueError unless a queue holds a whole number of batches, each of all ranks."""
    if length % batch:
        raise ValueError(
            f"--queue_length {length} is not a multiple of the batch, {batch} on all ranks; "
            f"use {max(length // batch, 1) * batch}"
        )


def width_of(backbone: nn.Module) -> int:
    """The number of features that a backbone returns."""
    return int(backbone.num_features)  # type: ignore[arg-type]
