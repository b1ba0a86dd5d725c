"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (arXiv 2002.05709)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..flags import flag
from ..heads import projection_mlp
from ..kernels import nt_xent
from ..pipelines.views import View
from . import er
from .base import Branch, Method, Objective, Step


@dataclass(frozen=True)
class SimCLRSettings:
    """SimCLR's own settings, as in the paper for ResNet-50 at batch 4096."""

    temperature: float = flag(0.1, "temperature of NT-Xent")
    hidden_dim: int = flag(2048, "width of the projection head's hidden layer")
    out_dim: int = flag(128, "dimension of the projection")
    kappa: float = flag(10.0, "concentration of the von Mises-Fisher kernel, for the bound")


class SimCLR(Method):
    """NT-Xent between the views of an image; the entropy-reconstruction twin replaces it on the sphere."""

    Settings = SimCLRSettings
    # README of google-research/simclr: LARS, lr 0.3 per 256, warm-up 10, weight decay 1e-4, 100 epochs at 4096.
    defaults: ClassVar[Mapping[str, Any]] = {
        "arch": "resnet50",
        "optimizer": "lars",
        "lr": 0.3,
        "min_lr": 0.0,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "clip_grad": 0.0,
        "drop_path_rate": 0.0,
    }
    views = (View(size=224, count=2, scale=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5),)

    def __init__(self, backbone: nn.Module, settings: SimCLRSettings, *, entropy: bool, n_global: int) -> None:
        super().__init__(entropy=entropy, n_global=n_global)
        self.settings = settings
        width = int(backbone.num_features)  # type: ignore[arg-type]
        head = projection_mlp((width, settings.hidden_dim, settings.out_dim), last_batch_norm=True)
        self.student = Branch(backbone, head)
        self.teacher = None

    def forward(self, views: Sequence[Tensor], step: Step) -> Objective:
        """Mean NT-Xent over all pairs of views, or the entropy-reconstruction objective."""
        z = self.student(views)
        if self.entropy:
            return er.sphere(z, kappa=self.settings.kappa, group=self.group)
        pairs = [nt_xent(a, b, temperature=self.settings.temperature, group=self.group) for a, b in combinations(z, 2)]
        bound = er.sphere(z.detach(), kappa=self.settings.kappa, group=self.group).bound if step.measure else None
        return Objective(torch.stack(pairs).mean(), bound)
