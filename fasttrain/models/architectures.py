"""Backbones: timm's networks, also under DINO's names, and small networks for small images."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import ConvNormAct, PatchEmbed
from timm.models import Eva, ResNet, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..pipelines.views.recipe import Size, sides, size_text
from .batchnorm import has_batch_norm

_DINO_NAMES = {f"vit_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
_SMALL_IMAGE = 64


class ConvSmall(nn.Module):
    """Five 3x3 convolutions with BatchNorm and ReLU, 16 to 128 channels, two of them strided; then the mean over space.

    It is for images of 28 to 64 pixels, on which it trains on two CPU cores. It has 0.13 M parameters and computes 7
    million products per image of 28 pixels. Its last layer sees almost the whole image.
    """

    widths: tuple[int, ...] = (16, 32, 64, 64, 128)
    strides: tuple[int, ...] = (2, 1, 2, 1, 1)

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
        """Return features [B, num_features] of images [B, C, H, W]."""
        features: Tensor = self.layers(x).mean((2, 3))
        return features

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns by which timm numbers the layers of a network."""
        return {"stem": r"^layers\.0\.", "blocks": r"^layers\.(\d+)\."}


class ConvMedium(ConvSmall):
    """One more convolution, and channels up to 256: a network of the same kind for images of 64 to 96 pixels.

    It has 0.43 M parameters and computes 43 million products per image of 64 pixels. Its last layer sees 43 pixels.
    """

    widths = (16, 32, 64, 64, 128, 256)
    strides = (2, 1, 2, 1, 2, 1)


_OURS = {"conv_small": ConvSmall, "conv_medium": ConvMedium}
_MINI = "vit_mini"
_MINI_OPTIONS = {"embed_dim": 96, "depth": 4, "num_heads": 3, "patch_size": 4}
"""A ViT of 0.46 M parameters for images of 28 to 64 pixels, which trains on two CPU cores."""


def create_backbone(
    arch: str,
    *,
    in_chans: int = 3,
    img_size: Size = 224,
    patch_size: int | None = None,
    num_heads: int | None = None,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """Return a network without a classifier whose forward pass gives features [B, num_features].

    ``arch`` is ``conv_small``, ``conv_medium``, ``vit_mini`` (4 blocks of width 96, patches of 4 pixels), one of DINO's
    names (``vit_tiny``, ``vit_small``, ``vit_base``, ``vit_large``, with patches of 16 pixels) or any timm model.
    ``patch_size`` and ``num_heads`` replace the values of the name of a ViT.

    ViTs accept crops of every size. For images of up to 64 pixels, a ResNet's 7x7 stem is replaced by CIFAR's.

    Raise ValueError for an unknown name, a network that timm cannot build, or a patch size that does not divide the
    image.
    """
    if arch in _OURS:
        return _OURS[arch](in_chans)
    name = _DINO_NAMES["vit_tiny"] if arch == _MINI else timm_name(arch)
    if name is None:
        known = [*_OURS, _MINI, *_DINO_NAMES, *timm.list_models()]
        close = difflib.get_close_matches(arch, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists the names"
        raise ValueError(f"--arch: {arch!r} is unknown; {hint}")
    options: dict[str, Any] = {"in_chans": in_chans}
    if drop_path_rate:
        options["drop_path_rate"] = drop_path_rate
    if arch == _MINI:
        options |= _MINI_OPTIONS
        patch_size = patch_size or _MINI_OPTIONS["patch_size"]
    if name.startswith("vit_"):
        if patch_size and any(side % patch_size for side in sides(img_size)):
            raise ValueError(
                f"--patch_size: must divide the image of {size_text(img_size)} pixels, got {patch_size}. "
                "Choose a divisor."
            )
        options |= {"img_size": img_size} | vit_options(patch_size, num_heads)
    network = _of_every_size(name, img_size, options)
    if name.startswith("resnet") and max(sides(img_size)) <= _SMALL_IMAGE:
        _cifar_stem(network, in_chans)
    return network


def timm_name(arch: str) -> str | None:
    """Return timm's name of a network, or None for our own networks and for unknown names."""
    name = _DINO_NAMES.get(arch, arch)
    return name if arch not in _OURS and timm.is_model(name) else None


def vit_options(patch_size: int | None, num_heads: int | None) -> dict[str, int]:
    """Return the arguments of ``timm.create_model`` that replace the patch size and the heads of a ViT's name."""
    options = {"patch_size": patch_size, "num_heads": num_heads}
    return {name: value for name, value in options.items() if value is not None}


def create_timm(name: str, **options: Any) -> nn.Module:
    """Return ``timm.create_model`` without a classifier, with ``num_features`` set to the width of its output.

    Raise ValueError with one line for any error of timm.
    """
    try:
        network: nn.Module = timm.create_model(name, num_classes=0, **options)
    except Exception as error:  # no drop path, heads that do not divide the width: each network raises other errors
        heads = options.get("num_heads")
        fix = "Choose another." if heads is None else f"--num_heads {heads} must divide its width."
        raise ValueError(f"--arch: {name!r} cannot be built: {_first_line(error)}. {fix}") from error
    width = getattr(network, "head_hidden_size", None)  # some networks widen the features after their last stage
    if width is not None and width != network.num_features:
        network.num_features = width
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) != layer.stride:
            layer.register_forward_pre_hook(_contiguous)
    return network


def _contiguous(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Copy channels-last images before a strided 1x1 convolution, whose backward pass oneDNN of torch 2.14 crashes in.

    The loader's views are channels-last. FastViT begins with such a convolution.
    """
    return (inputs[0].contiguous(),) if inputs[0].shape[1] <= 4 else inputs


def _of_every_size(name: str, size: Size, options: dict[str, Any]) -> nn.Module:
    """Return timm's network for images of every size if it supports that, else for this size."""
    try:
        return create_timm(name, **options | {"img_size": size, "dynamic_img_size": True})
    except ValueError as error:
        if not isinstance(error.__cause__, TypeError):  # timm knows the argument; something else is wrong
            raise
    return create_timm(name, **options | ({"img_size": size} if has_one_size(name) else {}))


def has_one_size(name: str) -> bool:
    """Return whether timm builds a network for images of one size only."""
    return bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))


def _cifar_stem(network: nn.Module, in_chans: int) -> None:
    """Replace a ResNet's 7x7 stride-2 stem and max pooling, which would shrink a 32-pixel image to 1 pixel.

    Stems of several convolutions and ResNetV2's stem are not replaced.
    """
    if not (isinstance(network, ResNet) and isinstance(network.conv1, nn.Conv2d)):
        return
    conv = nn.Conv2d(in_chans, network.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = conv
    network.maxpool = nn.Identity()


def start_residuals_at_one(network: nn.Module) -> None:
    """Initialise the last BatchNorm gamma of each residual block of a ResNet with 1; timm initialises it with 0."""
    if isinstance(network, ResNet):
        for layer in network.modules():
            if isinstance(layer, _BatchNorm):
                nn.init.ones_(layer.weight)


def has_cifar_stem(network: nn.Module) -> bool:
    """Return whether a network is a ResNet with the stem for small images, which timm does not build."""
    return isinstance(network, ResNet) and isinstance(network.maxpool, nn.Identity)


def checkpoint_activations(network: nn.Module) -> None:
    """Store only the inputs of a network's blocks, and recompute the rest in backward (timm's grad checkpointing).

    Raise ValueError for a network without support, or with BatchNorm, whose statistics would be updated twice.
    """
    if has_batch_norm(network):
        raise ValueError(
            "--activation_checkpointing: would update BatchNorm's statistics twice. Use a ViT or leave it out."
        )
    if not hasattr(network, "set_grad_checkpointing"):
        raise ValueError(
            f"--activation_checkpointing: {type(network).__name__} does not support it. Use a ViT or leave it out."
        )
    network.set_grad_checkpointing()  # type: ignore[operator]


def check_crops(network: nn.Module, sizes: Iterable[Size], channels: int = 3, *, flag: str | None = None) -> None:
    """Raise ValueError if a network does not accept images of one of these sizes, in pixels.

    A ViT's patch size must divide them. Other networks are tried with an image of each size: they may be built for one
    size, or return no features [B, num_features]. The error names ``flag``, or else the flag of the network.
    """
    patches = getattr(network, "patch_embed", None)
    for size in sizes:
        divides = isinstance(patches, PatchEmbed) and all(map(_divides, patches.patch_size, sides(size)))
        if isinstance(patches, PatchEmbed) and not divides:
            raise ValueError(
                f"{flag or '--patch_size'}: a view of {size_text(size)} pixels has no whole number of patches of "
                f"{patches.patch_size[0]} pixels. Choose another size of the views or patches."
            )
    vit = isinstance(network, VisionTransformer | Eva) and isinstance(patches, PatchEmbed) and network.dynamic_img_size
    if not (vit or isinstance(network, ConvSmall | ResNet)):
        for size in sorted(set(sizes), key=sides):
            features = _try(network, size, channels, flag or "--arch")
            if getattr(features, "shape", None) != (1, network.num_features):
                shape = [*features.shape] if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(
                    f"{flag or '--arch'}: {type(network).__name__} must return features [1, {network.num_features}], "
                    f"got {shape}. Choose another network."
                )


@torch.no_grad()
def _try(network: nn.Module, size: Size, channels: int, flag: str) -> Any:
    training = network.training
    network.eval()  # updates no statistics and draws no random numbers
    try:
        return network(torch.zeros(1, channels, *sides(size), device=next(network.parameters()).device))
    except Exception as error:  # each network raises its own error
        raise ValueError(
            f"{flag}: {type(network).__name__} does not accept a view of {size_text(size)} pixels "
            f"({_first_line(error)}). Choose other views, or a ViT or ResNet."
        ) from error
    finally:
        network.train(training)


def _divides(part: int, whole: int) -> bool:
    return whole % part == 0


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_vit(network: nn.Module) -> bool:
    """Return whether a network projects the patches of its image and adds a position embedding to each."""
    positions = getattr(network, "pos_embed", None)
    return (
        isinstance(getattr(network, "patch_embed", None), PatchEmbed)
        and isinstance(positions, Tensor)
        and positions.ndim == 3
    )


def fix_patch_embedding(vit: nn.Module, *, projection: bool) -> None:
    """Give a ViT frozen sine-cosine positions and, with ``projection``, freeze its patch projection too.

    As in MoCo v3 (arXiv 2104.02057, section 4.3), the position of the class token is 0. The patch projection and,
    separately, queries, keys and values are initialised Xavier-uniform.
    """
    with torch.no_grad():
        for name, layer in vit.named_modules():
            if isinstance(layer, nn.Linear):
                # One tensor holds the matrices of queries, keys and values.
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
    """Return positions [rows * columns, dim]: sine and cosine of column and row, ``dim`` / 4 frequencies each."""
    if dim % 4:
        raise ValueError(f"--arch: sine-cosine positions need a width divisible by 4, got {dim}")
    rate = 10000 ** -(torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = [x.flatten()[:, None] * rate for x in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def user_backbone(network: nn.Module | Callable[[int], nn.Module], channels: int, size: Size) -> nn.Module:
    """Return a copy of a user's backbone, or the result of a user's function, with ``num_features`` set.

    The backbone must return features [B, D] for images [B, channels, H, W] of this size. Raise ValueError otherwise.
    """
    made = copy.deepcopy(network) if isinstance(network, nn.Module) else network(channels)
    features = _try(made, size, channels, "model")
    if not (isinstance(features, Tensor) and features.ndim == 2):
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"model: must return features [B, D], got {shape}. Remove its classifier and pool its output.")
    made.num_features = features.shape[1]  # type: ignore[assignment]
    return made
