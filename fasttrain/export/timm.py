"""Export weights as .safetensors: for ``timm.create_model``, or of any network for fasttrain."""

from __future__ import annotations

from pathlib import Path

import timm

from ..models.weights import metadata, save_tensors
from ..pretrained import Backbone, from_file, timm_arguments
from .check import check_same


def write_timm(backbone: Backbone, path: Path) -> str:
    """Write a file for ``timm.create_model(arch, checkpoint_path=PATH, num_classes=0, ...)``; return such a line.

    Raise ConfigError for a network that timm does not have.
    """
    name, options = timm_arguments(backbone.blueprint)
    _write(backbone, path)
    loaded = timm.create_model(name, checkpoint_path=str(path), num_classes=0, **options).eval()
    check_same(backbone, loaded, "timm")
    written = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"timm.create_model({name!r}, checkpoint_path={path.name!r}, num_classes=0{written})"


def write_safetensors(backbone: Backbone, path: Path) -> str:
    """Write weights and arguments of any network for ``fasttrain eval`` and ``from_file``; return a line to load it."""
    _write(backbone, path)
    check_same(backbone, from_file(path).network, "fasttrain")
    return f"fasttrain.pretrained.from_file(Path({path.name!r})).network"


def _write(backbone: Backbone, path: Path) -> None:
    save_tensors(backbone.network, path, metadata(backbone.blueprint.as_dict()))
