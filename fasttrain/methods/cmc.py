"""CMC: Contrastive Multiview Coding (arXiv 1906.05849)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flags import Fraction, Natural, Positive, Several, flag
from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single
from ..losses import CMCLoss, CMCMemoryLoss
from ..models.heads import projection_mlp
from ..models.sensors import Sensors
from ..pipelines.views.recipe import ViewRecipe
from .base import Objective, Step, Task
from .bound import SphereMethod, SphereSettings
from .branch import Network, width_of
from .registry import register

_LUMINANCE, _CHROMA = 1, 2  # channels of L and ab, or of Y and CbCr


@dataclass(frozen=True)
class CMCSettings(SphereSettings):
    """CMC's settings, as in its official code with the softmax objective."""

    temperature: Positive = flag(0.07, "temperature of InfoNCE")
    out_dim: Several = flag(128, "dimension of the projection")
    mlp: bool = flag(False, "a head of two layers (CMC v2) instead of one")
    negatives: Natural = flag(16384, "negatives drawn from the memory; 0: the batch's other images, no memory")
    memory_momentum: Fraction = flag(0.5, "momentum of an image's row in the memory")


@register("cmc")
class CMC(SphereMethod):
    """InfoNCE between two sensors' encoders, each against a memory of the other's projections; or its twin.

    The memory suits many images and a slow optimizer, because its rows are an epoch old. Few images do better without
    it.

    In the colour spaces lab and ycbcr the sensors are an image's luminance and its chroma, cut from the same crop. In
    rgb, and for grey images, they are two random views (ours: the paper has no such pair). With several crops the
    memory follows each in turn.
    """

    Settings = CMCSettings
    settings: CMCSettings
    family = "contrastive"
    zero_init_residual = False

    def __init__(self, network: Network, settings: CMCSettings, task: Task) -> None:
        self.by_channel = task.views.color_space != "rgb"
        self.global_views_needed = 1 if self.by_channel else 2
        super().__init__(settings, task)
        if not self.by_channel and task.views.n_views != 2:
            raise ValueError(f"--recipe: cmc in rgb compares 2 views, got {task.views.n_views}. Use color_space: lab.")
        channels = self.encoder_channels(task.views)
        self.student = SensorBranch(Sensors(network, channels, self.by_channel), settings)
        self.loss = CMCLoss(settings.temperature)
        self.memory_loss = None
        if not task.entropy and settings.negatives:
            self.memory_loss = CMCMemoryLoss(
                task.images,
                settings.out_dim,
                temperature=settings.temperature,
                negatives=settings.negatives,
                momentum=settings.memory_momentum,
            )
            self.image_memories = {"memory_loss.memory.bank": 1}

    @classmethod
    def encoder_channels(cls, views: ViewRecipe) -> tuple[int, ...]:
        """Return the channels of luminance and chroma, or all channels twice."""
        return (_LUMINANCE, _CHROMA) if views.color_space != "rgb" else (views.channels,) * 2

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return ``l(luminance, chroma) + l(chroma, luminance)``, mean over the crops, or the twin's objective."""
        crops = [view for group in views for view in group]
        seen = [self.student.backbone.split(crop) for crop in crops] if self.by_channel else [(crops[0], crops[1])]
        pairs = [self.student(luminance, chroma) for luminance, chroma in seen]

        def twin() -> Objective:
            unit = [(normalize_rows(a), normalize_rows(b)) for a, b in pairs]
            return self.sphere_objective([z for pair in unit for z in pair], unit, step)

        return self.objective(step, lambda: torch.stack([self._contrast(pair, indices) for pair in pairs]).mean(), twin)

    def _contrast(self, pair: tuple[Tensor, Tensor], indices: Tensor) -> Tensor:
        loss: Tensor = self.loss(pair) if self.memory_loss is None else self.memory_loss(pair, indices)
        return loss


class SensorBranch(nn.Module):
    """The two encoders with a projection head each."""

    def __init__(self, backbone: Sensors, settings: CMCSettings) -> None:
        super().__init__()
        self.backbone = backbone
        widths = [width_of(encoder) for encoder in backbone.encoders]
        dims = [(w, w, settings.out_dim) if settings.mlp else (w, settings.out_dim) for w in widths]
        self.heads = nn.ModuleList([projection_mlp(d, batch_norm=False) for d in dims])

    def forward(self, *images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projections [B, D], in fp32, of each sensor's images."""
        first, second = (
            at_least_single(head(encoder(x)))
            for head, encoder, x in zip(self.heads, self.backbone.encoders, images, strict=True)
        )
        return first, second
