"""Recognise the plain ViT of 2020, which Hugging Face and facebookresearch/dino have too."""

from __future__ import annotations

import re

from timm.models import VisionTransformer
from torch import nn

_KEY = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)


def plain_vit(network: nn.Module) -> VisionTransformer | None:
    """Return the network if it is a ViT with a class token, learnt positions, attention and MLP only; else None."""
    if not isinstance(network, VisionTransformer) or network.global_pool != "token" or not network.has_class_token:
        return None
    names = network.state_dict().keys()
    whole = {"cls_token", "pos_embed", "norm.bias", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias"} <= names
    return network if whole and all(_KEY.fullmatch(name) for name in names) else None
