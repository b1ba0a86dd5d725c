"""InfoMin: What Makes for Good Views for Contrastive Learning? (arXiv 2005.10243)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..flags import Fraction, Positive, flag
from ..kernels.precision import at_least_single
from .base import Objective, Step, Task
from .branch import Network, slice_views, width_of
from .moco import MoCo, MoCoSettings, moco_head
from .registry import register


@dataclass(frozen=True)
class InfoMinSettings(MoCoSettings):
    """MoCo's settings and the weight of the jigsaw branch, as in the official code (PyContrast)."""

    temperature: Positive = flag(0.15, "temperature of InfoNCE")
    beta: Fraction = flag(0.5, "weight of the jigsaw branch; the plain one has 1 - beta")


@register("infomin")
class InfoMin(MoCo):
    """MoCo with stronger views and a second query: the image cut into shuffled patches (PIRL's jigsaw)."""

    Settings: ClassVar[type[MoCoSettings]] = InfoMinSettings
    settings: InfoMinSettings

    def __init__(self, network: Network, settings: InfoMinSettings, task: Task) -> None:
        super().__init__(network, settings, task)
        each = task.views.each
        self.patches = [i for i, view in enumerate(each) if view.jigsaw]
        if not self.patches or self.patches != list(range(self.patches[0], len(each))):
            raise ValueError("--recipe: infomin needs a jigsaw view as the last view. Use --recipe imagenet.")
        self.jigsaw = JigsawHead(width_of(self.student.backbone), len(self.patches), settings)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return ``(1 - beta)`` InfoNCE of the plain query plus ``beta`` InfoNCE of the jigsaw's, or the twin's.

        Both share one key and one queue.
        """
        beta, first = self.settings.beta, self.patches[0]
        key = self.keys(slice_views(views, 1, 2), step)
        plain_views = [*slice_views(views, 0, 1), *slice_views(views, 2, first)]
        plain = self.in_splits(self.student.projections, plain_views)
        jigsaw = self.in_splits(self._project_jigsaw, slice_views(views, first))
        queue = self.loss.queue

        def loss() -> Tensor:
            mean = torch.stack([self.loss.contrast(query, key, queue) for query in plain]).mean()
            return (1 - beta) * mean + beta * self.loss.contrast(jigsaw[0], key, queue)

        objective = self.objective(step, loss, lambda: self.twin(torch.cat([plain, jigsaw]), key, queue, step))
        self.enqueue(key)
        return objective

    def _project_jigsaw(self, patches: Sequence[Tensor]) -> Tensor:
        projected: Tensor = self.jigsaw(self.student.backbone, patches)
        return projected[None]


class JigsawHead(nn.Module):
    """Projects each patch, concatenates an image's patches in random order, and projects the result."""

    def __init__(self, width: int, patches: int, settings: MoCoSettings) -> None:
        super().__init__()
        self.each = moco_head(width, settings)
        self.joined = nn.Linear(patches * settings.out_dim, settings.out_dim)

    def forward(self, backbone: nn.Module, views: Sequence[Tensor]) -> Tensor:
        """Return the projections [B, D], in fp32, of patches [P, B, C, H, W]."""
        batch = views[0].shape[1]
        features = torch.cat([backbone(group.flatten(0, 1)) for group in views])
        patches = self.each(features).view(-1, batch, self.joined.out_features).transpose(0, 1)  # [B, P, D]
        order = torch.rand(patches.shape[:2], device=patches.device).argsort(1)
        shuffled = patches.gather(1, order[..., None].expand_as(patches)).flatten(1)
        return at_least_single(self.joined(shuffled))
