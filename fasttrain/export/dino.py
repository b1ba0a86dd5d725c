"""The dictionary of facebookresearch/dino's checkpoints, which its ``eval_knn.py``, ``eval_linear.py`` etc. read."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.state import whole_tensors
from ..errors import ConfigError
from ..models.weights import load_weights, read_weights
from ..pretrained import Backbone
from .check import check_same
from .vit import plain_vit

_THEIR_SIZE = 224
_THEIR_ARCHS = {
    (192, 12, 3, 768): "vit_tiny",
    (384, 12, 6, 1536): "vit_small",
    (768, 12, 12, 3072): "vit_base",
}
"""Width, blocks, heads and width within the MLP of what their vision_transformer.py builds."""


def write_dino(backbone: Backbone, path: Path) -> str:
    """Write ``student`` (as DistributedDataParallel names it) and ``teacher``; returns the line that reads it.

    A DINO run's branches come with their heads, ``head.mlp`` and ``head.last_layer``; a method without a teacher has
    its student's backbone under both keys. Raises ConfigError for networks that DINO does not have.
    """
    if plain_vit(backbone.network) is None:
        arch = backbone.blueprint.arch
        raise ConfigError(f"--format dino is for plain ViTs, this is {arch}; choose timm, hf, onnx or safetensors")
    arch = _their_arch(backbone)
    own = _prefixed(backbone.network.state_dict(), "backbone.")
    branches = {"student": own, "teacher": own}
    if backbone.config is not None and backbone.checkpoint is not None:
        tensors = whole_tensors(backbone.checkpoint)  # once: all its files are compared with their sums
        for branch in branches:
            part = {k.removeprefix(f"{branch}."): tensors[k] for k in tensors if k.startswith(f"{branch}.")}
            if any(name.startswith("backbone.") for name in part):
                branches[branch] = _branch(part, heads=backbone.config.method == "dino")
    # Tensors that are cut from a mapped file would be saved with all of it.
    copies = {name: {key: tensor.clone() for key, tensor in part.items()} for name, part in branches.items()}
    torch.save({"student": _prefixed(copies["student"], "module."), "teacher": copies["teacher"]}, path)
    vit: Any = backbone.blueprint.build().eval()
    load_weights(vit, read_weights(path), str(path))
    check_same(backbone, vit, "facebookresearch/dino")
    size = backbone.blueprint.size
    channels = vit.patch_embed.proj.in_channels
    others = [f"img_size=[{size}]"] * (size != _THEIR_SIZE) + [f"in_chans={channels}"] * (channels != 3)
    theirs = f"its scripts assume {_THEIR_SIZE} pixels of 3 channels"
    built = f"  (build its ViT with {', '.join(others)}; {theirs})" if others else ""
    patch = f"--arch {arch} --patch_size {vit.patch_embed.patch_size[0]}"
    return f"python eval_knn.py --pretrained_weights {quote(path.name)} --checkpoint_key teacher {patch}{built}"


def _their_arch(backbone: Backbone) -> str:
    """Their name of a plain ViT: of another one they would read the weights and, with other heads, say nothing."""
    vit: Any = backbone.network
    block = vit.blocks[0]
    shape = (vit.embed_dim, len(vit.blocks), block.attn.num_heads, block.mlp.fc1.out_features)
    if shape not in _THEIR_ARCHS:
        raise ConfigError(
            f"--format dino is for ViT-tiny, small and base with 3, 6 and 12 heads; {backbone.blueprint.arch} has "
            f"width {shape[0]}, {shape[1]} blocks and {shape[2]} heads; choose timm, hf, onnx or safetensors"
        )
    return _THEIR_ARCHS[shape]


def dino_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``DINOHead``'s tensors of a branch's ``head`` and ``prototypes``; {} where DINOHead has no such layers.

    Ours has no bias where BatchNorm follows, theirs has one, which is 0. Prototypes are
    weight_g v / ||v||, with v = weight_v, in both.
    """
    mlp = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    last = max(int(name.partition(".")[0]) for name in mlp)
    if mlp[f"{last}.weight"].ndim == 1:  # BatchNorm at the bottleneck, which is ours
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
