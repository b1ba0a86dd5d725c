"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (arXiv 2006.09882)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..flags import flag
from ..heads import Prototypes, projection_mlp
from ..kernels import sinkhorn_center
from ..pipelines.views import View
from . import er
from .base import Branch, Method, Objective, Step

_VIEW = View(size=224, count=2, scale=(0.14, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5)


@dataclass(frozen=True)
class SwAVSettings:
    """SwAV's own settings, as in its official code for ResNet-50 at batch 4096."""

    nmb_prototypes: int = flag(3000, "number of prototypes")
    hidden_dim: int = flag(2048, "width of the projection head's hidden layer")
    out_dim: int = flag(128, "dimension of the projection")
    temperature: float = flag(0.1, "temperature of the predictions")
    epsilon: float = flag(0.05, "temperature of the codes (Sinkhorn's regularisation)")
    sinkhorn_iterations: int = flag(3, "iterations of Sinkhorn")
    queue_length: int = flag(0, "projections a global view and rank kept for Sinkhorn, for small batches; 0 for none")
    epoch_queue_starts: float = flag(15.0, "epoch from which the queue is used")
    freeze_prototypes_epochs: float = flag(1.0, "epochs during which the prototypes stay fixed")


class SwAV(Method):
    """Predict the other view's balanced code; the twin drops Sinkhorn, whose equipartition its entropy replaces."""

    Settings = SwAVSettings
    # Official code at batch 4096: LARC, lr 4.8 (0.3 per 256), warm-up 10, final lr / 1000, weight decay 1e-6.
    defaults: ClassVar[Mapping[str, Any]] = {
        "arch": "resnet50",
        "optimizer": "lars",
        "lr": 0.3,
        "min_lr": 0.0048,
        "weight_decay": 1e-6,
        "weight_decay_end": 1e-6,
        "clip_grad": 0.0,
        "drop_path_rate": 0.0,
    }
    views = (_VIEW, View(**{**vars(_VIEW), "size": 96, "count": 6, "scale": (0.05, 0.14), "local": True}))

    queue: Tensor
    queue_filled: Tensor

    def __init__(self, backbone: nn.Module, settings: SwAVSettings, *, entropy: bool, n_global: int) -> None:
        super().__init__(entropy=entropy, n_global=n_global)
        self.settings = settings
        width = int(backbone.num_features)  # type: ignore[arg-type]
        head = projection_mlp((width, settings.hidden_dim, settings.out_dim))
        self.student = Branch(backbone, head, Prototypes(settings.out_dim, settings.nmb_prototypes))
        self.teacher = None
        self.register_buffer("queue", torch.zeros(n_global, settings.queue_length, settings.out_dim))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.long))

    def forward(self, views: Sequence[Tensor], step: Step) -> Objective:
        """Mean over the global views' codes and all other views of the cross-entropy between code and prediction."""
        s = self.settings
        z, prototypes = self.student(views), self.student.prototypes()
        codes = z[: self.n_global].detach()
        return er.discrete(
            z,
            codes,
            prototypes,
            prototypes,
            student_temp=s.temperature,
            teacher_temp=s.epsilon,
            # The twin's entropy takes the place of Sinkhorn's equipartition.
            center=None if self.entropy else self._sinkhorn_centers(codes, prototypes.detach(), step),
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
                rows = torch.cat([codes, self.queue], dim=1)
            self.queue.copy_(torch.cat([codes, self.queue], dim=1)[:, : s.queue_length])
            self.queue_filled += codes.shape[1]
        centers = [
            sinkhorn_center(z @ prototypes.T, epsilon=s.epsilon, iterations=s.sinkhorn_iterations, group=self.group)
            for z in rows
        ]
        return torch.stack(centers)

    @property
    def frozen_prototype_epochs(self) -> float:
        """SwAV's ``freeze_prototypes_niters``, in epochs."""
        return self.settings.freeze_prototypes_epochs
