"""Two encoders side by side, for two sensors of the same image (CMC)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Sensors(nn.Module):
    """One encoder per sensor. Both encoders' features of an image are concatenated."""

    def __init__(self, network: Callable[[int], nn.Module], channels: Sequence[int], by_channel: bool) -> None:
        super().__init__()
        self.channels, self.by_channel = channels, by_channel
        encoders: list[Any] = [network(count) for count in channels]
        self.encoders = nn.ModuleList(encoders)
        self.num_features = sum(int(encoder.num_features) for encoder in encoders)

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the channels of each sensor from images [B, C, H, W]."""
        if not self.by_channel:
            return images, images
        luminance, chroma = torch.split(images, list(self.channels), dim=1)
        return luminance, chroma

    def forward(self, images: Tensor) -> Tensor:
        """Return the features [B, num_features] of images [B, C, H, W]."""
        return torch.cat([encoder(x) for encoder, x in zip(self.encoders, self.split(images), strict=True)], dim=1)
