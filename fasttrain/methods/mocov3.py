"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (arXiv 2104.02057)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flags import flag
from ..kernels import info_nce
from ..models.architectures import fix_patch_embedding, is_vit
from ..models.heads import projection_mlp
from ..models.teacher import make_teacher
from . import bound
from .base import Branch, Method, Network, Objective, Step, Task, other_pairs, slice_views, unit_predictions, width_of


@dataclass(frozen=True)
class MoCoV3Settings(bound.SphereSettings):
    """MoCo v3's own settings, with the names of its official code; the temperature is that of ResNet-50."""

    temperature: float = flag(1.0, "temperature; the authors take 0.2 for ViTs", above=0)
    hidden_dim: int = flag(4096, "width of the hidden layers of projection head and predictor", least=1)
    out_dim: int = flag(256, "dimension of the projection", least=1)
    stop_grad_conv1: bool = flag(True, "leave a ViT's patch projection at its random start, for stability")
    momentum_teacher: float = flag(0.99, "the momentum encoder's momentum at the start", least=0, most=1)
    momentum_teacher_end: float = flag(1.0, "the momentum encoder's momentum at the end (cosine)", least=0, most=1)


class MoCoV3(Method):
    """InfoNCE of predictions against the momentum encoder's keys of the batch, in both directions; or its twin."""

    Settings = MoCoV3Settings
    settings: MoCoV3Settings

    def __init__(self, network: Network, settings: MoCoV3Settings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        vit = is_vit(backbone)
        if vit:
            fix_patch_embedding(backbone, projection=settings.stop_grad_conv1)
        hidden, out = settings.hidden_dim, settings.out_dim
        # Three layers and a normalised prediction for ViTs, two and a bare one for ResNets, as the authors have it.
        widths = (width_of(backbone), *[hidden] * (2 if vit else 1), out)
        head = projection_mlp(widths, last_norm="plain", biases=False)
        self.student = Branch(backbone, head, views_apart=True)
        self.predictor = projection_mlp((out, hidden, out), last_norm="plain" if vit else "none", biases=False)
        self.teacher = make_teacher(self.student)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """``2 temperature`` times InfoNCE, summed over both directions (algorithm 1), mean over pairs; or its twin."""
        predictions = unit_predictions(self.predictor, self.student.projections(views))
        with torch.no_grad():
            keys = self.teacher(slice_views(views, 0, self.n_global))
        pairs = other_pairs(predictions, keys)
        return self.objective(
            step,
            lambda: 2 * torch.stack([self._contrast(q, k) for q, k in pairs]).mean(),
            lambda: bound.sphere(predictions, pairs, self.settings, group=self.group, measure=step.measure),
        )

    def _contrast(self, query: Tensor, keys: Tensor) -> Tensor:
        temperature = self.settings.temperature
        return 2 * temperature * info_nce(query, keys, temperature=temperature, group=self.group)
