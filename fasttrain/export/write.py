"""Write an export: the formats, the check of the target, and an atomic replacement of what was there."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError
from ..pretrained import Backbone


class Format(NamedTuple):
    """A format: the function ``fasttrain.export.<module>.<function>`` writes it."""

    module: str
    function: str
    suffix: str
    """Of its files; empty for a folder."""
    about: str


FORMATS = {
    "timm": Format("timm", "write_timm", ".safetensors", "safetensors that timm loads"),
    "safetensors": Format("timm", "write_safetensors", ".safetensors", "any network, for fasttrain"),
    "hf": Format("hf", "write_hf", "", "a folder for transformers"),
    "onnx": Format("onnx", "write_onnx", ".onnx", "ONNX"),
    "dino": Format("dino", "write_dino", ".pth", "facebookresearch/dino"),
}


def check_target(path: Path, name: str) -> None:
    """Raise ConfigError if a format cannot be written to a path."""
    suffix = FORMATS[name].suffix
    if suffix and path.suffix != suffix:
        raise ConfigError(f"--output {path}: must end in {suffix} for --format {name}.")
    if not suffix and path.exists():
        raise ConfigError(f"--output {path}: exists already. Choose a new folder.")
    if suffix and path.is_dir():
        raise ConfigError(f"--output {path}: is a folder. Choose a file.")


def write_export(backbone: Backbone, path: Path, name: str) -> str:
    """Write a network in a format; return a line about the check against the original.

    The files are written to a hidden folder next to ``path``, checked, and renamed, so that a file at ``path`` is
    always complete. Raise ConfigError if the network has no such format or the files cannot be written.
    """
    form = FORMATS[name]
    write = getattr(import_module(f".{form.module}", __package__), form.function)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=path.parent))
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}.") from None
    try:
        line = str(write(backbone, folder / path.name))
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        for part in sorted(folder.iterdir(), reverse=True):  # ONNX's weights before the graph that refers to them
            os.replace(part, path.parent / part.name)
        return line
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(folder)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
