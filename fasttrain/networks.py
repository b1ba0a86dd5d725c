"""Backbones: timm's, under DINO's names too, and a small convolutional network for small images."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_DINO_NAMES = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
_SMALL_IMAGE = 64


class ConvSmall(nn.Module):
    """Five 3x3 convolutions with BatchNorm and ReLU, 16 to 128 channels, two of them strided; then the mean over space.

    For images of 28 to 64 pixels, where it trains on two CPU cores: 0.13 M parameters, 7 million products an image of
    28 pixels, and a last layer that sees almost all of one.
    """

    widths = (16, 32, 64, 64, 128)
    strides = (2, 1, 2, 1, 1)

    def __init__(self, in_chans: int = 3) -> None:
        super().__init__()
        pairs = pairwise((in_chans, *self.widths))
        self.layers = nn.Sequential(
            *(
                ConvNormAct(a, b, kernel_size=3, stride=stride)
                for (a, b), stride in zip(pairs, self.strides, strict=True)
            )
        )
        self.num_features = self.widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, num_features] of images [B, C, H, W]."""
        features: Tensor = self.layers(x).mean((2, 3))
        return features


_OURS = {"conv_small": ConvSmall}


def create_backbone(
    arch: str,
    *,
    in_chans: int = 3,
    img_size: int = 224,
    patch_size: int = 16,
    num_heads: int | None = None,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A network without classifier whose forward gives features [B, num_features].

    ``arch`` is ``conv_small``, one of DINO's names (``vit_tiny``, ``vit_small``, ``vit_base``, ``vit_large``, with
    ``patch_size`` and, where it is not the usual one, ``num_heads``) or any timm model. ViTs take crops of every size;
    ResNets get CIFAR's stem below 64 pixels. Raises ValueError for a name that neither knows, or a patch size that does
    not divide the image.
    """
    if arch in _OURS:
        return _OURS[arch](in_chans)
    name = timm_name(arch)
    if name is None:
        known = [*_OURS, *_DINO_NAMES, *timm.list_models()]
        close = difflib.get_close_matches(arch, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists the names"
        raise ValueError(f"network {arch!r} is unknown; {hint}")
    options: dict[str, Any] = {"num_classes": 0, "in_chans": in_chans}
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    if name.startswith("vit_"):
        if img_size % patch_size:
            raise ValueError(
                f"patch_size {patch_size} does not divide the image of {img_size} pixels; choose a divisor"
            )
        options |= {"img_size": img_size, "patch_size": patch_size, "dynamic_img_size": True}
        options |= {} if num_heads is None else {"num_heads": num_heads}
    try:
        network: nn.Module = timm.create_model(name, **options)
    except TypeError as error:  # a timm model that has no drop path, say
        raise ValueError(f"network {arch!r} cannot be built: {error}") from error
    if name.startswith("resnet") and img_size <= _SMALL_IMAGE:
        _cifar_stem(network, in_chans)
    return network


def timm_name(arch: str) -> str | None:
    """The name by which timm knows a network; None for ours and for names that nobody knows."""
    name = _DINO_NAMES.get(arch, arch)
    return name if arch not in _OURS and timm.is_model(name) else None


def _cifar_stem(network: nn.Module, in_chans: int) -> None:
    """Replace a ResNet's 7x7 stride-2 stem and max pooling, which would leave a 32-pixel image 1 pixel wide."""
    conv = nn.Conv2d(in_chans, network.conv1.out_channels, 3, padding=1, bias=False)  # type: ignore[arg-type, union-attr]
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = conv
    network.maxpool = nn.Identity()


def checkpoint_activations(network: nn.Module) -> None:
    """Keep the inputs of a network's blocks only, and recompute the rest in backward (timm's grad checkpointing).

    Raises ValueError for a network that cannot, or one with BatchNorm, whose statistics would be counted twice.
    """
    if any(isinstance(layer, _BatchNorm) for layer in network.modules()):
        raise ValueError(
            "activation checkpointing would count BatchNorm's statistics twice; take a ViT or leave it out"
        )
    if not hasattr(network, "set_grad_checkpointing"):
        raise ValueError(f"{type(network).__name__} cannot checkpoint its activations; take a ViT, or leave it out")
    network.set_grad_checkpointing()  # type: ignore[operator]


def check_crops(network: nn.Module, sizes: Iterable[int]) -> None:
    """Raise ValueError if a ViT cannot cut crops of one of these sizes, in pixels, into patches."""
    if not is_vit(network):
        return
    patches: Any = network.patch_embed
    for size in sizes:
        if size % patches.patch_size[0]:
            raise ValueError(
                f"patch_size {patches.patch_size[0]} does not divide a view of {size} pixels; choose a divisor, "
                "or other views"
            )


def is_vit(network: nn.Module) -> bool:
    """Whether a network cuts its image into patches by a projection of its own."""
    return hasattr(network, "patch_embed") and hasattr(network, "pos_embed")


def fix_patch_embedding(vit: nn.Module, *, projection: bool) -> None:
    """Give a ViT sine-cosine positions that are not trained and, with ``projection``, fix its patch projection too.

    As MoCo v3 has it (arXiv 2104.02057, section 4.3): the position of the class token is 0; the projection and, in
    halves of their own, queries, keys and values start Xavier-uniform.
    """
    with torch.no_grad():
        for name, layer in vit.named_modules():
            if isinstance(layer, nn.Linear):
                # Queries, keys and values are three matrices that share one tensor.
                parts = layer.weight.chunk(3) if name.endswith("qkv") else [layer.weight]
                for part in parts:
                    nn.init.xavier_uniform_(part)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        patches: Any = vit.patch_embed
        weight = patches.proj.weight
        bound = math.sqrt(6 / (weight[0].numel() + weight.shape[0]))
        weight.uniform_(-bound, bound)
        patches.proj.bias.zero_()
        positions: Any = vit.pos_embed
        positions.zero_()
        table = sincos_positions(patches.grid_size, positions.shape[-1])
        positions[0, -len(table) :] = table
    positions.requires_grad_(False)
    patches.proj.requires_grad_(not projection)


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Positions [rows * columns, dim]: sine and cosine of column and of row, a quarter of ``dim`` frequencies each."""
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that 4 divides, got {dim}")
    rate = 10000 ** -(torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = [x.flatten()[:, None] * rate for x in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
