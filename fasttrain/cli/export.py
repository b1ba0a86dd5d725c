"""``fasttrain export RUN|FILE|--timm NAME --format F --output PATH``: write the network for another program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.arguments import Parser
from ..errors import ConfigError
from ..export.write import FORMATS, check_target, write_export
from ..flags import FilePath, flag
from .source import SourceOptions, add_source, open_backbone


@dataclass(frozen=True)
class ExportOptions:
    """The format and the place of an export."""

    format: str | None = flag(None, "one of " + ", ".join(f"{name} ({form.about})" for name, form in FORMATS.items()))
    output: FilePath | None = flag(None, "the file to write, or the folder for hf")


def main(arguments: Sequence[str]) -> int:
    """Export a network; return the exit status."""
    parser = Parser("export", "Write a network for another program, and check that it computes the same features.")
    add_source(parser)
    parser.add_settings("export", ExportOptions)
    namespace, (source, options) = parser.options(arguments, SourceOptions, ExportOptions)
    if options.format not in FORMATS:
        raise ConfigError(f"--format: must be one of {', '.join(FORMATS)}, got {options.format}.")
    if options.output is None:
        raise ConfigError("--output: is missing. Name the file to write, or the folder for hf.")
    if source.which and options.format == "dino":
        raise ConfigError("--which: the format dino holds both branches. Leave it out.")
    if source.size and not source.timm:
        raise ConfigError("--size: needs --timm NAME. A trained network has its own size.")
    check_target(options.output, options.format)
    backbone = open_backbone(namespace, source)
    line = write_export(backbone, options.output, options.format)
    for note in backbone.notes:
        print(note)
    print(f"{backbone.name}: {options.format} in {options.output}\n  {line}")
    return 0
