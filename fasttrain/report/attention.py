"""Attention maps of the [CLS] token in a ViT's last block (arXiv 2104.14294, figure 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ..errors import ConfigError
from .neighbours import Shown, choose
from .pictures import data_uri, heat
from .samples import Sample

IMAGES, HEADS = 6, 6
"""Number of images, and the largest number of heads."""


@torch.no_grad()
def attention(network: nn.Module, images: Tensor) -> Tensor:
    """Return the attention of the [CLS] token to the patches in the last block: [B, heads, rows, columns].

    This is ``softmax(q_cls k^T / sqrt(d))`` per head, without the columns of [CLS] and of registers, so the sum is
    below 1. Raise ConfigError for a network without a [CLS] token or without such a matrix.
    """
    vit: Any = network
    blocks = getattr(vit, "blocks", None)
    if getattr(vit, "cls_token", None) is None or not blocks or not hasattr(vit, "patch_embed"):
        raise ConfigError("the network has no [CLS] token: it is not a ViT, or it pools its patches")
    layer: Any = getattr(blocks[-1], "attn", None)
    if not isinstance(getattr(layer, "attn_drop", None), nn.Module):
        raise ConfigError(f"{type(network).__name__} does not expose its attention")
    matrices: list[Tensor] = []
    training = network.training
    network.eval()
    hook = layer.attn_drop.register_forward_hook(lambda module, inputs, output: matrices.append(output))
    try:
        with _unfused(layer):
            vit.forward_features(images)
    finally:
        hook.remove()
        network.train(training)
    size = to_2tuple(vit.patch_embed.patch_size)
    grid = images.shape[-2] // size[0], images.shape[-1] // size[1]
    tokens = grid[0] * grid[1] + getattr(vit, "num_prefix_tokens", 1)
    if not matrices or matrices[0].shape[-2:] != (tokens, tokens):  # attention in windows, or [CLS] is added later
        raise ConfigError(f"{type(network).__name__} has no attention of [CLS] to all patches in its last block")
    return matrices[0][:, :, 0, -grid[0] * grid[1] :].reshape(*matrices[0].shape[:2], *grid)


def table(sample: Sample) -> list[list[Shown]]:
    """Return a row per image: the image, the mean over the heads, then each of the first heads."""
    network = sample.backbone.network
    chosen = choose(sample, IMAGES)
    maps = attention(network, sample.inputs(chosen)).cpu()
    rows = []
    for i, picture, heads in zip(chosen, sample.pictures(chosen), maps, strict=True):
        name = sample.describe(i)
        row = [Shown(data_uri(picture), f"Image: {name}")]
        row.append(Shown(data_uri(heat(heads.mean(0).numpy())), f"Attention of [CLS] over {name}, mean over heads"))
        for number, head in enumerate(heads[:HEADS], 1):
            row.append(Shown(data_uri(heat(head.numpy())), f"Attention of [CLS] over {name}, head {number}"))
        rows.append(row)
    return rows


@contextmanager
def _unfused(layer: Any) -> Iterator[None]:
    """Turn fused attention off, because it never forms the matrix."""
    before = getattr(layer, "fused_attn", False)
    layer.fused_attn = False
    try:
        yield
    finally:
        layer.fused_attn = before
