"""Stochastic depth that computes only the samples it keeps, as in DINOv2 (arXiv 2304.07193, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def residual(x: Tensor, branch: Callable[[Tensor], Tensor], rate: float) -> Tensor:
    """Return ``x + branch(x)``, with the branch computed on a random part of the samples and scaled.

    Of B samples, ``k = max(floor(B (1 - rate)), 1)`` are drawn without replacement. Their branch is multiplied by
    B / k, so the expectation over the draw is ``x + branch(x)``, as for stochastic depth. ``x`` has the shape [B, ...].
    """
    batch = x.shape[0]
    kept = max(int(batch * (1 - rate)), 1)
    if kept == batch:
        return x + branch(x)
    rows = torch.randperm(batch, device=x.device)[:kept]
    return x.index_add(0, rows, branch(x.index_select(0, rows)).to(x.dtype), alpha=batch / kept)


class _VitBlock(Block):  # type: ignore[misc]
    sample_drop_rate = 0.0

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        rate = self.sample_drop_rate if self.training else 0.0
        x = residual(x, lambda kept: self.ls1(self.attn(self.norm1(kept), **attention)), rate)
        return residual(x, lambda kept: self.ls2(self.mlp(self.norm2(kept))), rate)


class _EvaBlock(EvaBlock):  # type: ignore[misc]
    sample_drop_rate = 0.0

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        rate = self.sample_drop_rate if self.training else 0.0
        x = residual(x, lambda kept: _scaled(self.attn(self.norm1(kept), **attention), self.gamma_1), rate)
        return residual(x, lambda kept: _scaled(self.mlp(self.norm2(kept)), self.gamma_2), rate)


_SAMPLE_DROPPING: dict[type[nn.Module], type[nn.Module]] = {Block: _VitBlock, EvaBlock: _EvaBlock}


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def drop_samples(network: nn.Module, rate: float) -> None:
    """Let every block of a ViT compute only a part of the samples in training. All blocks have the same rate.

    The names of the weights do not change. Raise ValueError for a network without timm's ViT blocks.
    """
    blocks = [layer for layer in network.modules() if type(layer) in _SAMPLE_DROPPING]
    if not blocks:
        raise ValueError(
            f"--drop_path_subset: {type(network).__name__} does not support it. Use a ViT or leave it out."
        )
    for block in blocks:
        block.__class__ = _SAMPLE_DROPPING[type(block)]
        block.sample_drop_rate = rate  # type: ignore[assignment]


def remove_stochastic_depth(network: nn.Module) -> None:
    """Let a network compute all samples in training too."""
    for layer in network.modules():
        if isinstance(layer, DropPath):
            layer.drop_prob = 0.0
        if isinstance(layer, _VitBlock | _EvaBlock):
            layer.sample_drop_rate = 0.0
