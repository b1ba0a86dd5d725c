"""InfoMin: What Makes for Good Views for Contrastive Learning? (arXiv 2005.10243)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..flags import flag
from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single
from .base import Network, Objective, Step, Task, slice_views, width_of
from .moco import MoCo, MoCoSettings, moco_head


@dataclass(frozen=True)
class InfoMinSettings(MoCoSettings):
    """MoCo's settings and the weight of the jigsaw branch, as in the official code (PyContrast)."""

    temperature: float = flag(0.15, "temperature of InfoNCE", above=0)
    beta: float = flag(0.5, "weight of the jigsaw branch; the plain one has 1 - beta", least=0, most=1)


class InfoMin(MoCo):
    """MoCo with stronger views and a second query: the image cut into shuffled patches (PIRL's jigsaw)."""

    Settings: ClassVar[type[MoCoSettings]] = InfoMinSettings
    settings: InfoMinSettings

    def __init__(self, network: Network, settings: InfoMinSettings, task: Task) -> None:
        super().__init__(network, settings, task)
        each = task.views.each
        self.patches = [i for i, view in enumerate(each) if view.jigsaw]
        if not self.patches or self.patches != list(range(self.patches[0], len(each))):
            raise ValueError("infomin needs a jigsaw view at the end of the recipe's views, as --recipe imagenet has")
        self.jigsaw = JigsawHead(width_of(self.student.backbone), len(self.patches), settings)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """``(1 - beta)`` InfoNCE of the plain query and ``beta`` that of the jigsaw's, against one key and queue."""
        s, first = self.settings, self.patches[0]
        key = self.keys(slice_views(views, 1, 2), step)
        plain = self.in_splits(self.student, [*slice_views(views, 0, 1), *slice_views(views, 2, first)])
        patches = slice_views(views, first, first + len(self.patches))
        shuffled = self.in_splits(self._joined, patches)[0]
        queries = [*plain, shuffled]
        queue = self.queue.bank.clone()

        def loss() -> Tensor:
            mean = torch.stack([self.contrast(query, key, queue) for query in plain]).mean()
            return (1 - s.beta) * mean + s.beta * self.contrast(shuffled, key, queue)

        objective = self.objective(step, loss, lambda: self.twin(queries, key, queue, step))
        self.enqueue(key)
        return objective

    def _joined(self, patches: Sequence[Tensor]) -> Tensor:
        joined: Tensor = self.jigsaw(self.student.backbone, patches)
        return joined[None]


class JigsawHead(nn.Module):
    """Projects every patch, joins an image's patches in random order, and projects them together."""

    def __init__(self, width: int, patches: int, settings: MoCoSettings) -> None:
        super().__init__()
        self.each = moco_head(width, settings)
        self.joined = nn.Linear(patches * settings.out_dim, settings.out_dim)

    def forward(self, backbone: nn.Module, views: Sequence[Tensor]) -> Tensor:
        """Unit-norm rows [B, D] of patches [P, B, C, H, W]."""
        batch = views[0].shape[1]
        features = torch.cat([backbone(group.flatten(0, 1)) for group in views])
        patches = self.each(features).view(-1, batch, self.joined.out_features).transpose(0, 1)  # [B, P, D]
        order = torch.rand(patches.shape[:2], device=patches.device).argsort(1)
        shuffled = patches.gather(1, order[..., None].expand_as(patches)).flatten(1)
        return normalize_rows(at_least_single(self.joined(shuffled)))
