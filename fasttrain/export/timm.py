"""Weights as .safetensors: in timm's key layout for ``timm.create_model``, and of any network for ourselves."""

from __future__ import annotations

from pathlib import Path

import timm
from safetensors.torch import save_file

from ..models.weights import metadata
from ..pretrained import Backbone, from_file, timm_arguments
from .check import check_same


def write_timm(backbone: Backbone, path: Path) -> str:
    """Write what ``timm.create_model(arch, checkpoint_path=PATH, num_classes=0, ...)`` loads, and load it so.

    Returns the line that loads it. Raises ConfigError for a network that timm does not have.
    """
    name, options = timm_arguments(backbone.blueprint)
    _write(backbone, path)
    loaded = timm.create_model(name, checkpoint_path=str(path), num_classes=0, **options).eval()
    check_same(backbone, loaded, "timm")
    written = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"timm.create_model({name!r}, checkpoint_path={path.name!r}, num_classes=0{written})"


def write_safetensors(backbone: Backbone, path: Path) -> str:
    """Write weights and how to build the network, which ``fasttrain eval`` and ``from_file`` read; any network."""
    _write(backbone, path)
    check_same(backbone, from_file(path).network, "fasttrain")
    return f"fasttrain.pretrained.from_file(Path({path.name!r})).network"


def _write(backbone: Backbone, path: Path) -> None:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in backbone.network.state_dict().items()}
    save_file(tensors, path, metadata=metadata(backbone.blueprint.as_dict()))
