"""The command line: every field of the configuration is a flag, under the launchers' and DINO's habits."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.table import Table

from .. import methods
from ..errors import ConfigError, unknown_name
from . import recipes
from .settings import Config, TrainConfig, resolve


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """Read the command line; returns the configuration and whether ``--print_config`` was given.

    Raises ConfigError for anything that cannot be used, with the nearest right name where there is one.
    """
    arguments = [underscored(a) for a in arguments]
    first, _ = _parser(None).parse_known_args(arguments)
    file = read_yaml(Path(first.config)) if first.config else {}
    name = first.method or file.get("method")
    if name is None:
        if first.help:
            _parser(None).show_help()
        raise ConfigError(f"--method is missing; choose one of {', '.join(methods.names())}")
    try:
        method = methods.load(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    given = vars(_parser(method).parse_args(arguments))
    special = {k: given.pop(k) for k in ("method", "config", "print_config", "local_rank", "help")}
    values = {k: v for k, v in given.items() if v is not None}
    return resolve(name, values, file), special["print_config"]


def asks_for_recipes(arguments: Sequence[str]) -> bool:
    """Whether ``--recipe list`` is among the arguments."""
    asked, _ = _parser(None).parse_known_args([underscored(a) for a in arguments])
    return bool(asked.recipe == "list")


def print_recipes() -> None:
    """A table of all recipes with what was published for their values."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 1, 0))
    for column in ("method", "recipe", "network", "epochs", "published, and the source of the values"):
        table.add_column(column, no_wrap=column in ("method", "recipe"))
    for e in recipes.entries():
        table.add_row(e.method, e.recipe, e.arch, str(e.epochs), f"{e.published}\n{e.source}")
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file. Raises ConfigError where it cannot be read or holds something else."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold 'name: value' lines")
    return content


def underscored(argument: str) -> str:
    """``--batch-size-per-gpu=8`` as ``--batch_size_per_gpu=8``; values keep their dashes."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


class Parser(argparse.ArgumentParser):
    """Errors are ConfigErrors of one line; unknown flags get the nearest right name."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ConfigError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; ConfigError for one that is unknown, with the nearest right name."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            raise ConfigError(unknown_name(f"argument {name}", name.lstrip("-"), known, "--"))
        if parsed.help:
            self.show_help()
        return parsed

    def show_help(self) -> NoReturn:
        """Print the page and end the process."""
        self.print_help()
        raise SystemExit(0)


def _parser(method: type[methods.Method] | None) -> Parser:
    parser = Parser(
        prog="fasttrain train",
        description="Train a backbone by multi-view self-supervision. Without --data_path: on the embedded digits.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page (with --method M, M's flags too)")
    parser.add_argument("--method", metavar="M", help="one of " + ", ".join(methods.names()))
    parser.add_argument(
        "--entropy", nargs="?", const=True, type=_yes_or_no, help="optimise the entropy-reconstruction bound instead"
    )
    parser.add_argument("--recipe", metavar="NAME", help="a set of published or tried values; list shows them all")
    parser.add_argument("--config", metavar="FILE", help="YAML file, as a run's config.yaml")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers inject it; the environment says it too
    _add_flags(parser.add_argument_group("trainer"), TrainConfig)
    if method is not None:
        _add_flags(parser.add_argument_group(method.__name__), method.Settings)
    return parser


def _add_flags(group: argparse._ArgumentGroup, cls: type[Any]) -> None:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = _without_none(hints[f.name])
        options: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {f.default})"}
        if kind is bool:
            options |= {"nargs": "?", "const": True, "type": _yes_or_no, "metavar": "true|false"}
        elif typing.get_origin(kind) is tuple:
            numbers = typing.get_args(kind)
            options |= {"nargs": "*" if Ellipsis in numbers else len(numbers), "type": float, "metavar": "X"}
        else:
            options["metavar"] = f.name.rpartition("_")[2].upper()
            options["type"] = {int: int, float: float}.get(kind, _literal if typing.get_origin(kind) else str)
        group.add_argument(f"--{f.name}", **options)


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _literal(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _yes_or_no(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
