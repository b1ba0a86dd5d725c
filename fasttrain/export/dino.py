"""Export as a checkpoint of facebookresearch/dino, for its ``eval_knn.py``, ``eval_linear.py`` and others."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.state import whole_tensors
from ..errors import ConfigError
from ..models.weights import load_weights, read_weights
from ..pipelines import size_text
from ..pretrained import Backbone
from .check import check_same
from .vit import plain_vit

_THEIR_SIZE = 224
_THEIR_ARCHS = {
    (192, 12, 3, 768): "vit_tiny",
    (384, 12, 6, 1536): "vit_small",
    (768, 12, 12, 3072): "vit_base",
}
"""Networks of their vision_transformer.py, by width, number of blocks, number of heads and width of the MLP."""


def write_dino(backbone: Backbone, path: Path) -> str:
    """Write ``student`` (with the names of DistributedDataParallel) and ``teacher``; return a command that reads them.

    The branches of a DINO run include their heads, ``head.mlp`` and ``head.last_layer``. A method without a teacher has
    its student's backbone under both keys. Raise ConfigError for networks that DINO does not have.
    """
    if plain_vit(backbone.network) is None:
        arch = backbone.blueprint.arch
        raise ConfigError(f"--format: dino needs a plain ViT, got {arch}. Use timm, hf, onnx or safetensors.")
    size = backbone.blueprint.size
    if not isinstance(size, int):
        raise ConfigError(f"--format: dino needs square images, got {size_text(size)}. Use timm, hf or onnx.")
    arch = _their_arch(backbone)
    own = _prefixed(backbone.network.state_dict(), "backbone.")
    branches = {"student": own, "teacher": own}
    if backbone.config is not None and backbone.checkpoint is not None:
        tensors = whole_tensors(backbone.checkpoint)
        for branch in branches:
            part = {k.removeprefix(f"{branch}."): tensors[k] for k in tensors if k.startswith(f"{branch}.")}
            if any(name.startswith("backbone.") for name in part):
                branches[branch] = _branch(part, heads=backbone.config.method == "dino")
    # Without copies, torch would save the whole mapped file with each slice.
    copies = {name: {key: tensor.clone() for key, tensor in part.items()} for name, part in branches.items()}
    torch.save({"student": _prefixed(copies["student"], "module."), "teacher": copies["teacher"]}, path)
    vit: Any = backbone.blueprint.build().eval()
    load_weights(vit, read_weights(path), str(path))
    check_same(backbone, vit, "facebookresearch/dino")
    channels = vit.patch_embed.proj.in_channels
    others = [f"img_size=[{size}]"] * (size != _THEIR_SIZE) + [f"in_chans={channels}"] * (channels != 3)
    theirs = f"its scripts assume {_THEIR_SIZE} pixels and 3 channels"
    built = f"  (build its ViT with {', '.join(others)}; {theirs})" if others else ""
    patch = f"--arch {arch} --patch_size {vit.patch_embed.patch_size[0]}"
    return f"python eval_knn.py --pretrained_weights {quote(path.name)} --checkpoint_key teacher {patch}{built}"


def _their_arch(backbone: Backbone) -> str:
    """Return their name of a plain ViT. They would load a ViT with another number of heads without an error."""
    vit: Any = backbone.network
    block = vit.blocks[0]
    shape = (vit.embed_dim, len(vit.blocks), block.attn.num_heads, block.mlp.fc1.out_features)
    if shape not in _THEIR_ARCHS:
        raise ConfigError(
            f"--format: dino needs a ViT-tiny, small or base with 3, 6 or 12 heads, got {backbone.blueprint.arch} with "
            f"width {shape[0]}, {shape[1]} blocks and {shape[2]} heads. Use timm, hf, onnx or safetensors."
        )
    return _THEIR_ARCHS[shape]


def dino_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``DINOHead``'s tensors for a branch's ``head`` and ``prototypes``, or {} if it has no such layers.

    A linear layer before BatchNorm has no bias here. Theirs gets a bias of 0. In both, prototypes are
    weight_g v / ||v|| with v = weight_v.
    """
    mlp = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    last = max(int(name.partition(".")[0]) for name in mlp)
    if mlp[f"{last}.weight"].ndim == 1:  # BatchNorm at the bottleneck, which DINOHead does not have
        return {}
    for name in [name for name in mlp if name.endswith(".weight") and mlp[name].ndim == 2]:
        mlp.setdefault(name.replace(".weight", ".bias"), torch.zeros(len(mlp[name])))
    directions = tensors["prototypes.weight"]
    lengths = tensors.get("prototypes.norm", torch.ones(len(directions), 1))
    return {
        **_prefixed(mlp, "head.mlp."),
        "head.last_layer.weight_g": lengths,
        "head.last_layer.weight_v": directions,
    }


def _branch(tensors: dict[str, Tensor], *, heads: bool) -> dict[str, Tensor]:
    backbone = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    return backbone | (dino_head(tensors) if heads else {})


def _prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
