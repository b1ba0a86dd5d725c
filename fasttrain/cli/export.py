"""``fasttrain export RUN|FILE|--timm NAME --format F --output PATH``: the network for another program."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

_FORMATS = {
    "timm": ("timm", "write_timm", ".safetensors"),
    "safetensors": ("timm", "write_safetensors", ".safetensors"),
    "hf": ("hf", "write_hf", ""),
    "onnx": ("onnx", "write_onnx", ".onnx"),
    "dino": ("dino", "write_dino", ".pth"),
}
"""Name of a format: the module, its function, and the ending of its files."""


def main(arguments: Sequence[str]) -> int:
    """Export a network; returns the exit status: 0, or 2 with one line for what cannot be used."""
    from ..distributed.world import prepare_environment

    prepare_environment()
    try:
        from ..errors import ConfigError
        from ..pretrained import open_backbone
    except ModuleNotFoundError as error:
        return _fail(f"export needs {error.name}; type: pip install 'fasttrain[train]'")
    try:
        given = _parse(arguments)
        path = _target(given)
        backbone = open_backbone(given)
        module, name, _ = _FORMATS[given.format]
        write = getattr(import_module(f"fasttrain.export.{module}"), name)
        line = _publish(path, lambda part: str(write(backbone, part)))
    except ConfigError as error:
        return _fail(str(error))
    print(f"{backbone.name}: {given.format} in {path}\n  {line}")
    return 0


def _parse(arguments: Sequence[str]) -> Namespace:
    from ..config.arguments import Parser, underscored
    from ..errors import ConfigError
    from ..pretrained import add_source_flags

    parser = Parser(
        prog="fasttrain export",
        description="Write a network for another program, and hold what that program reads to it.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page")
    add_source_flags(parser)
    formats = "timm (safetensors), hf (a folder), onnx, dino (.pth); safetensors is for fasttrain, of any network"
    parser.add_argument("--format", choices=tuple(_FORMATS), help=formats)
    parser.add_argument("--output", metavar="PATH", help="the file, or hf's folder, to write")
    given: Namespace = parser.parse_args([underscored(a) for a in arguments])
    for needed, hint in (("format", f"choose {', '.join(_FORMATS)}"), ("output", "name the file, or hf's folder")):
        if getattr(given, needed) is None:
            raise ConfigError(f"--{needed} is missing; {hint}")
    if given.which and given.format == "dino":
        raise ConfigError("--format dino has both branches; leave --which out")
    if given.size and not given.timm:
        raise ConfigError("--size goes with --timm NAME; a trained network has its own")
    return given


def _target(given: Namespace) -> Path:
    from ..errors import ConfigError

    path, ending = Path(given.output), _FORMATS[given.format][2]
    if ending and path.suffix != ending:
        raise ConfigError(f"--output {path} must end in {ending} for --format {given.format}")
    if not ending and path.exists():
        raise ConfigError(f"--output {path} is there already; choose a new folder")
    if ending and path.is_dir():
        raise ConfigError(f"--output {path} is a folder; choose a file")
    return path


def _publish(path: Path, write: Callable[[Path], str]) -> str:
    """Write beside ``path`` and rename what was written and checked: what is there is always whole."""
    from ..errors import ConfigError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".export-", dir=path.parent))
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from None
    try:
        line = write(folder / path.name)
        for file in folder.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
        for part in sorted(folder.iterdir(), reverse=True):  # ONNX's file of weights before the graph that names it
            os.replace(part, path.parent / part.name)
        return line
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _fail(message: str) -> int:
    print(f"fasttrain: {message}", file=sys.stderr)
    return 2
