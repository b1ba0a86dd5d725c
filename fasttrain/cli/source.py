"""The flags that name a network, ``RUN|FILE|--timm NAME``, shared by eval and export."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from ..config.arguments import Parser
from ..errors import ConfigError
from ..flags import FilePath, Seed, Sides, flag, size_of, user_path
from ..methods import load_plugin
from ..pretrained import Backbone, from_file, from_run, from_timm


@dataclass(frozen=True)
class SourceOptions:
    """The network that a command uses."""

    timm: str | None = flag(None, "a timm model instead; random weights without --pretrained")
    pretrained: FilePath | None = flag(None, "weights for --timm, in any layout that --init_from reads")
    which: Literal["teacher", "student"] | None = flag(None, "branch of a run; default: the teacher, if any")
    size: Sides | None = flag(None, "side of the images in pixels, or their HEIGHT WIDTH; default: the network's own")
    seed: Seed = flag(0, "seed of random weights and draws")
    plugin: FilePath | None = flag(None, "Python file that registers the run's method; it is run")


def add_source(parser: Parser) -> None:
    """Add the flags that name a network."""
    parser.add_argument("source", nargs="?", metavar="RUN|FILE", help="folder of a run or checkpoint, or an export")
    parser.add_settings("network", SourceOptions)


def open_backbone(namespace: Namespace, options: SourceOptions) -> Backbone:
    """Return the network that the flags name. Raise ConfigError for anything invalid."""
    source = namespace.source
    if options.plugin is not None:
        load_plugin(options.plugin)
    if (source is None) == (options.timm is None):
        raise ConfigError("RUN|FILE: name one network: the folder of a run, an exported file, or --timm NAME.")
    if options.timm is not None:
        if options.which is not None:
            raise ConfigError("--which: applies to runs only. Leave it out with --timm.")
        return from_timm(options.timm, pretrained=options.pretrained, size=size_of(options.size), seed=options.seed)
    path = user_path(source)
    if options.pretrained is not None:
        raise ConfigError("--pretrained: needs --timm NAME.")
    if not path.exists():
        raise ConfigError(f"{path}: no such run or file. Give the folder of a run or an exported .safetensors file.")
    if path.is_dir():
        return from_run(path, options.which)
    if options.which is not None:
        raise ConfigError("--which: applies to runs only. An exported file holds one network.")
    return from_file(path)
