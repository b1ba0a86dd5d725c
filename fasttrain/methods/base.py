"""The interface of a method: views in, loss and bound out.

A method knows views and networks. It does not know ranks (it hands ``self.group`` to the reductions) nor steps (the
engine calls ``forward``, then steps the optimizer, then calls ``end_step``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..heads import Prototypes
from ..kernels.collectives import Group
from ..losses import Bound as Bound
from ..pipelines.views import View


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


@dataclass(frozen=True)
class Objective:
    """What a forward pass returns: the scalar to minimise, and the bound where it was measured."""

    loss: Tensor
    bound: Bound | None


class Branch(nn.Module):
    """A backbone with its projection head and, for the methods that have them, prototypes."""

    def __init__(self, backbone: nn.Module, head: nn.Module, prototypes: Prototypes | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        if prototypes is not None:
            self.prototypes = prototypes

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Project views grouped by resolution, each [V_g, B, C, H, W], to unit-norm rows [V, B, D] in fp32.

        One backbone pass a resolution, one pass of the head over all.
        """
        batch = views[0].shape[1]
        features = torch.cat([self.backbone(group.flatten(0, 1)) for group in views])
        projections: Tensor = self.head(features).float()
        unit: Tensor = nn.functional.normalize(projections, dim=1)
        return unit.view(-1, batch, unit.shape[1])


def global_views(views: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first ``count`` views, still grouped by resolution."""
    chosen: list[Tensor] = []
    for group in views:
        if count <= 0:
            break
        chosen.append(group[:count])
        count -= len(group)
    return chosen


class Method(nn.Module):
    """One paper. Subclasses set ``Settings``, ``defaults`` and ``views``, build branches, define ``forward``."""

    Settings: ClassVar[type[Any]]
    """Frozen dataclass of the method's own flags, with the paper's values."""
    defaults: ClassVar[Mapping[str, Any]]
    """The paper's values of the trainer's flags where they differ from DINO's (optimizer, learning rate, ...)."""
    views: ClassVar[tuple[View, ...]]
    """The paper's views of an image."""
    min_global_views: ClassVar[int] = 2

    student: Branch
    teacher: Branch | None

    def __init__(self, *, entropy: bool, n_global: int) -> None:
        super().__init__()
        if n_global < self.min_global_views:
            raise ValueError(f"this method needs {self.min_global_views} global views, the recipe has {n_global}")
        self.entropy = entropy
        self.n_global = n_global
        self.group: Group | None = None

    @abstractmethod
    def forward(self, views: Sequence[Tensor], step: Step) -> Objective:
        """The objective of one batch of views, grouped by resolution, global views first."""

    def end_step(self, step: Step) -> None:
        """Called after the optimizer's step: the teacher follows the student."""

    def momentum(self, step: Step) -> float | None:
        """The teacher's momentum at this step, or None without a teacher."""
        return None

    @property
    def frozen_prototype_epochs(self) -> float:
        """For how many epochs the prototypes' learning rate stays 0."""
        return 0

    @property
    def backbone(self) -> nn.Module:
        """The network whose features are evaluated and exported: the teacher's where there is one."""
        branch = self.student if self.teacher is None else self.teacher
        return branch.backbone
