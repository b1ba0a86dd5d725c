"""CMC: Contrastive Multiview Coding (arXiv 1906.05849)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..flags import flag
from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single
from ..losses import CMCMemoryLoss
from ..losses.info_nce import symmetric_info_nce
from ..models.heads import projection_mlp
from ..pipelines.views.recipe import ViewRecipe
from . import bound
from .base import Method, Network, Objective, Step, Task, width_of

_LUMINANCE, _CHROMA = 1, 2  # channels of L and ab, or of Y and CbCr


@dataclass(frozen=True)
class CMCSettings(bound.SphereSettings):
    """CMC's own settings, as in its official code with the softmax objective."""

    temperature: float = flag(0.07, "temperature of InfoNCE", above=0)
    out_dim: int = flag(128, "dimension of the projection", least=1)
    mlp: bool = flag(False, "a head of two layers (CMC v2) in place of one")
    negatives: int = flag(
        16384, "images drawn from the memory as negatives; 0: the batch's other images, no memory", least=0
    )
    memory_momentum: float = flag(0.5, "momentum of an image's row in the memory", least=0, most=1)


class CMC(Method):
    """InfoNCE between two sensors' encoders, each against a memory of the other's projections; or its twin.

    The memory suits many images and a slow optimizer (its rows are an epoch old); few images do better without it.

    In the colour spaces lab and ycbcr the sensors are an image's luminance and its chroma, cut from the same crop. In
    rgb, and on grey images, they are two random views (ours: the paper has no such pair). With several crops the memory
    follows each in turn.
    """

    Settings = CMCSettings
    settings: CMCSettings
    zero_init_residual = False

    def __init__(self, network: Network, settings: CMCSettings, task: Task) -> None:
        self.by_channel = task.views.color_space != "rgb"
        self.global_views_needed = 1 if self.by_channel else 2
        super().__init__(settings, task)
        if not self.by_channel and task.views.n_views != 2:
            raise ValueError(
                f"cmc in rgb compares two views, the recipe has {task.views.n_views}; use color_space: lab"
            )
        channels = self.encoder_channels(task.views)
        self.student = SensorBranch(Sensors(network, channels, self.by_channel), settings)
        self.memory = None
        if not task.entropy and settings.negatives:
            self.memory = CMCMemoryLoss(
                task.images,
                settings.out_dim,
                temperature=settings.temperature,
                negatives=settings.negatives,
                momentum=settings.memory_momentum,
                gather_distributed=True,
            )
            self.image_memories = {"memory.memory.bank": 1}

    @classmethod
    def encoder_channels(cls, views: ViewRecipe) -> tuple[int, ...]:
        """Luminance and chroma, or all channels twice."""
        return (_LUMINANCE, _CHROMA) if views.color_space != "rgb" else (views.channels,) * 2

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """``l(luminance, chroma) + l(chroma, luminance)``, mean over the crops; or the twin of the two."""
        crops = [view for group in views for view in group]
        seen = [self.student.backbone.split(crop) for crop in crops] if self.by_channel else [(crops[0], crops[1])]
        pairs = [self.student(luminance, chroma) for luminance, chroma in seen]
        return self.objective(
            step,
            lambda: torch.stack([self._contrast(pair, indices) for pair in pairs]).mean(),
            lambda: bound.sphere(
                [z for pair in pairs for z in pair],
                pairs,
                self.settings,
                group=self.group,
                measure=step.measure,
            ),
        )

    def _contrast(self, pair: tuple[Tensor, Tensor], indices: Tensor) -> Tensor:
        if self.memory is not None:
            loss: Tensor = self.memory(pair, indices)
            return loss
        return 2 * symmetric_info_nce(*pair, temperature=self.settings.temperature, group=self.group)


class Sensors(nn.Module):
    """An encoder for each of two sensors; features of an image are those of both, side by side."""

    def __init__(self, network: Network, channels: Sequence[int], by_channel: bool) -> None:
        super().__init__()
        self.channels, self.by_channel = channels, by_channel
        self.encoders = nn.ModuleList([network(count) for count in channels])
        self.num_features = sum(width_of(encoder) for encoder in self.encoders)

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What each sensor sees of images [B, C, H, W]."""
        if not self.by_channel:
            return images, images
        luminance, chroma = torch.split(images, list(self.channels), dim=1)
        return luminance, chroma

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, num_features] of images [B, C, H, W]."""
        return torch.cat([encoder(x) for encoder, x in zip(self.encoders, self.split(images), strict=True)], dim=1)


class SensorBranch(nn.Module):
    """The two encoders with a projection head each."""

    def __init__(self, backbone: Sensors, settings: CMCSettings) -> None:
        super().__init__()
        self.backbone = backbone
        widths = [width_of(encoder) for encoder in backbone.encoders]
        dims = [(w, w, settings.out_dim) if settings.mlp else (w, settings.out_dim) for w in widths]
        self.heads = nn.ModuleList([projection_mlp(d, batch_norm=False) for d in dims])

    def forward(self, *images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-norm projections [B, D] of what each sensor sees."""
        first, second = (
            normalize_rows(at_least_single(head(encoder(x))))
            for head, encoder, x in zip(self.heads, self.backbone.encoders, images, strict=True)
        )
        return first, second
