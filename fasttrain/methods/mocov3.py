"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (arXiv 2104.02057)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..flags import Count, Fraction, Positive, Several, flag
from ..kernels.normalize import normalize_rows
from ..losses import MoCoV3Loss
from ..losses.base import other_pairs
from ..models.architectures import fix_patch_embedding, is_vit
from ..models.heads import projection_mlp
from ..models.teacher import make_teacher
from .base import Objective, Step, Task
from .bound import SphereMethod, SphereSettings
from .branch import Branch, Network, predict, slice_views, width_of
from .registry import register


@dataclass(frozen=True)
class MoCoV3Settings(SphereSettings):
    """MoCo v3's settings, with the names of its official code. The temperature is that for ResNet-50."""

    temperature: Positive = flag(1.0, "temperature; the authors use 0.2 for ViTs")
    hidden_dim: Count = flag(4096, "width of the hidden layers of projection head and predictor")
    out_dim: Several = flag(256, "dimension of the projection")
    stop_grad_conv1: bool = flag(True, "freeze a ViT's random patch projection, for stability")
    momentum_teacher: Fraction = flag(0.99, "momentum of the momentum encoder at the start")
    momentum_teacher_end: Fraction = flag(1.0, "momentum of the momentum encoder at the end (cosine schedule)")


@register("mocov3")
class MoCoV3(SphereMethod):
    """InfoNCE of predictions against the momentum encoder's keys of the batch, in both directions; or its twin."""

    Settings = MoCoV3Settings
    settings: MoCoV3Settings
    family = "contrastive"
    has_teacher = True

    def __init__(self, network: Network, settings: MoCoV3Settings, task: Task) -> None:
        super().__init__(settings, task)
        backbone = network(task.views.channels)
        vit = is_vit(backbone)
        if vit:
            fix_patch_embedding(backbone, projection=settings.stop_grad_conv1)
        hidden, out = settings.hidden_dim, settings.out_dim
        # As in the official code: three layers and a normalised prediction for ViTs, two and a plain one for ResNets.
        widths = (width_of(backbone), *[hidden] * (2 if vit else 1), out)
        head = projection_mlp(widths, last_norm="plain", biases=False)
        self.student = Branch(backbone, head, views_apart=True)
        self.predictor = projection_mlp((out, hidden, out), last_norm="plain" if vit else "none", biases=False)
        self.teacher = make_teacher(self.student)
        self.loss = MoCoV3Loss(settings.temperature)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return ``2 temperature`` InfoNCE, both directions summed (algorithm 1), mean over pairs; or the twin's."""
        predictions = predict(self.predictor, self.student.projections(views))
        with torch.no_grad():
            keys = self.teacher.projections(slice_views(views, 0, self.n_global))

        def twin() -> Objective:
            z = normalize_rows(predictions)
            return self.sphere_objective(z, other_pairs(z, normalize_rows(keys)), step)

        return self.objective(step, lambda: self.loss.views(predictions, keys), twin)
