"""Read weights from files: our exports, timm's, lightly's and facebookresearch/dino's. Nothing is unpickled."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..errors import ConfigError
from ..files import describe_load_error

# The first one in a file counts: DINO's teacher before its student; then lightly's, Lightning's and timm's checkpoints.
_PARTS = ("teacher", "student", "state_dict_ema", "state_dict", "model_ema", "model")
_WRAPPERS = ("module.", "_orig_mod.")
_BACKBONES = ("teacher_backbone.", "backbone.", "student_backbone.")
# torchvision's ResNet as lightly's examples have it: nn.Sequential(*list(resnet.children())[:-1]).
_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_KEY = "fasttrain"


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return the description of the network that ``fasttrain export`` wrote into a .safetensors file, or None."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        return None if text is None else dict(json.loads(text))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from None


def metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the header of a .safetensors file, which :func:`read_metadata` reads."""
    return {"format": "pt", _KEY: json.dumps(about)}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the backbone's tensors in a file, under timm's names, without projection heads.

    Supported are .safetensors and torch files of timm and torchvision (their own names), lightly (``backbone.`` in a
    Lightning checkpoint or a state_dict, ResNets in an nn.Sequential, ViTs in timm's wrapper) and facebookresearch/dino
    (``teacher``, ``backbone.``). Raise ConfigError for a missing or corrupt file, and for one with code in it.
    """
    tensors = _tensors(_load(path))
    if not tensors:
        raise ConfigError(f"{path}: holds no weights. Give a state_dict, or a checkpoint of lightly or DINO.")
    for prefix in _WRAPPERS:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for prefix in _BACKBONES:
        if any(name.startswith(prefix) for name in tensors):
            tensors = _below(tensors, prefix)
            break
    if "vit.cls_token" in tensors:  # next to a mask token
        tensors = _below(tensors, "vit.")
    if "0.weight" in tensors and any(name.startswith("4.0.conv1.") for name in tensors):
        split = {name: name.partition(".") for name in tensors}
        tensors = {f"{_SEQUENTIAL.get(n, n)}.{rest}": tensors[name] for name, (n, _, rest) in split.items()}
    return tensors


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Load tensors into a network. Names and shapes must match, with three exceptions.

    A classifier that the network does not have is ignored. A ViT's positions for images of another size are
    interpolated with timm. A first convolution of 3 channels is adapted to the network's channels as timm does. Raise
    ConfigError, which names ``origin``, if anything else is missing, superfluous or of another shape.
    """
    expected = network.state_dict()
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    loaded = {name: tensor for name, tensor in tensors.items() if name in expected or not name.startswith(heads)}
    if "pos_embed" in loaded and "pos_embed" in expected:
        loaded["pos_embed"] = _positions(loaded["pos_embed"], network)
    if (first := _first_convolution(network)) in loaded:
        loaded[first] = _for_channels(loaded[first], expected[first])
    for name in [n for n in expected if n.endswith("num_batches_tracked") and n not in loaded]:
        loaded[name] = expected[name]
    for name, tensor in expected.items():
        if name not in loaded:
            raise _foreign(origin, network, f"it has no {name!r}")
        if loaded[name].shape != tensor.shape:
            raise _foreign(origin, network, f"{name!r} is {[*loaded[name].shape]}, not {[*tensor.shape]}")
    if left := sorted(loaded.keys() - expected.keys()):
        raise _foreign(origin, network, f"it has {left[0]!r}, which the network does not have")
    network.load_state_dict(loaded)


def _first_convolution(network: nn.Module) -> str:
    """Return the name of the weights of a network's first convolution."""
    convolutions = (name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    return f"{next(convolutions, '')}.weight"


def _for_channels(weight: Tensor, own: Tensor) -> Tensor:
    """Return the weights of a first convolution for 3 channels for another number of channels, as timm does."""
    if weight.ndim != 4 or weight.shape[1] != 3 or own.shape[1] == 3 or weight.shape[2:] != own.shape[2:]:
        return weight
    adapted: Tensor = adapt_input_conv(own.shape[1], weight)
    return adapted


def _positions(positions: Tensor, vit: nn.Module) -> Tensor:
    patches: Any = getattr(vit, "patch_embed", None)
    own: Any = vit.pos_embed
    if patches is None or positions.ndim != 3 or own.shape == positions.shape or own.shape[-1] != positions.shape[-1]:
        return positions
    prefix = own.shape[1] - patches.num_patches
    resampled: Tensor = resample_abs_pos_embed(positions.float(), list(patches.grid_size), num_prefix_tokens=prefix)
    return resampled


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give a file of weights.")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        # DINO's checkpoints hold their arguments, in a class that only has attributes.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises any error for a corrupt file
        raise _unreadable(path, error) from None


def _tensors(content: Any) -> dict[str, Tensor]:
    """Return the state_dict in a file's content."""
    if not isinstance(content, Mapping):
        return {}
    for part in _PARTS:
        if isinstance(content.get(part), Mapping):
            return _tensors(content[part])
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: {describe_load_error(error)} Choose another file.")


def _foreign(origin: str, network: nn.Module, why: str) -> ConfigError:
    return ConfigError(f"{origin}: has the weights of another network than {type(network).__name__}: {why}.")
