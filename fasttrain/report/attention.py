"""Where the [CLS] token of a ViT's last block looks (arXiv 2104.14294, figure 1)."""

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
"""Images shown, and heads of each at most."""


@torch.no_grad()
def attention(network: nn.Module, images: Tensor) -> Tensor:
    """Attention of the [CLS] token to the patches in the last block: [B, heads, rows, columns].

    ``softmax(q_cls k^T / sqrt(d))`` of each head, of which the columns of patches are returned; a row sums to 1 less
    what goes to [CLS] itself and to registers. Raises ConfigError for a network that has no [CLS] token to ask.
    """
    vit: Any = network
    blocks = getattr(vit, "blocks", None)
    if getattr(vit, "cls_token", None) is None or not blocks or not hasattr(vit, "patch_embed"):
        raise ConfigError("the network has no [CLS] token: it is no ViT, or pools its patches")
    layer: Any = getattr(blocks[-1], "attn", None)
    if not isinstance(getattr(layer, "attn_drop", None), nn.Module):
        raise ConfigError(f"{type(network).__name__} keeps its attention to itself")
    found: list[Tensor] = []
    training = network.training
    network.eval()
    hook = layer.attn_drop.register_forward_hook(lambda module, given, result: found.append(result))
    try:
        with _unfused(layer):
            vit.forward_features(images)
    finally:
        hook.remove()
        network.train(training)
    size = to_2tuple(vit.patch_embed.patch_size)
    grid = images.shape[-2] // size[0], images.shape[-1] // size[1]
    tokens = grid[0] * grid[1] + getattr(vit, "num_prefix_tokens", 1)
    if not found or found[0].shape[-2:] != (tokens, tokens):  # in windows, or [CLS] joins later
        raise ConfigError(f"{type(network).__name__} has no attention of [CLS] to all patches in its last block")
    return found[0][:, :, 0, -grid[0] * grid[1] :].reshape(*found[0].shape[:2], *grid)


def table(sample: Sample) -> list[list[Shown]]:
    """A row an image: itself, the mean over the heads, then each of the first heads."""
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
    """Fused attention never forms the matrix, so the layer goes the long way here."""
    before = getattr(layer, "fused_attn", False)
    layer.fused_attn = False
    try:
        yield
    finally:
        layer.fused_attn = before
