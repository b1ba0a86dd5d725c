"""The command line: every setting is a flag, with the conventions of torchrun, DeepSpeed and facebookresearch/dino."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import methods
from ..errors import ConfigError, unknown_name
from ..flags import Settings, validated
from .resolve import COMMAND_FLAGS, Config, load_method, read_yaml, resolve
from .settings import PixelFlags, TrainConfig, ViewFlags


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """Return the configuration that the arguments of ``fasttrain train`` describe, and whether to only print it.

    Raise ConfigError for anything invalid, with the nearest known name if there is one.
    """
    arguments = [underscored(argument) for argument in arguments]
    first, _ = _parser(None).parse_known_args(arguments)
    if first.plugin is not None:
        methods.load_plugin(first.plugin)
    file = read_yaml(first.config) if first.config else {}
    name = first.method or file.get("method")
    if name is None:
        if first.help:
            _parser(None).show_help()
        raise ConfigError(f"--method: is missing. Choose one of {', '.join(methods.names())}.")
    method = load_method(name, None if first.plugin else file.get("plugin"))
    values = vars(_parser(method).parse_args(arguments))
    special = {key: values.pop(key) for key in COMMAND_FLAGS}
    values = {key: value for key, value in values.items() if value is not None}
    return resolve(name, values, file, plugin=special["plugin"]), special["print_config"]


def lists_recipes(arguments: Sequence[str]) -> bool:
    """Return whether ``--recipe list`` is among the arguments."""
    options, _ = _parser(None).parse_known_args([underscored(argument) for argument in arguments])
    return bool(options.recipe == "list")


def underscored(argument: str) -> str:
    """Return ``--batch-size-per-gpu=8`` as ``--batch_size_per_gpu=8``. Values keep their dashes."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError with one line, and suggests the nearest name for an unknown flag."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"fasttrain {command}", description=description, add_help=False, allow_abbrev=False)
        self.add_argument("-h", "--help", action="store_true", help="show this page")

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the message that argparse would print."""
        raise ConfigError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments. Raise ConfigError for an unknown one. Print the help page if it is requested."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            raise ConfigError(unknown_name(f"argument {name}", name.lstrip("-"), known, "--"))
        if parsed.help:
            self.show_help()
        return parsed

    def show_help(self) -> NoReturn:
        """Print the help page and end the process."""
        self.print_help()
        raise SystemExit(0)

    def options(
        self, arguments: Sequence[str], *classes: type[Any], positional: str | None = None
    ) -> tuple[argparse.Namespace, list[Any]]:
        """Parse the arguments of a command and check them against its settings classes.

        Return the namespace, for positional arguments, and an instance of each class. ``positional`` may follow a flag
        of several paths, which takes it first: ``--data_path A B RUN``. Raise ConfigError for anything invalid.
        """
        namespace = self.parse_args([underscored(argument) for argument in arguments])
        if positional is not None and getattr(namespace, positional) is None:
            taken = [v for k, v in vars(namespace).items() if k.endswith("_path") and isinstance(v, list) and v[1:]]
            if len(taken) == 1:
                setattr(namespace, positional, taken[0].pop())
        return namespace, [settings_from(namespace, cls) for cls in classes]

    def known_options(self, arguments: Sequence[str], cls: type[Settings]) -> tuple[Settings, list[str]]:
        """Return the settings of a command that also takes the flags of ``fasttrain train``, and those flags.

        Raise ConfigError for an invalid value. Print the help page if it is requested.
        """
        namespace, rest = self.parse_known_args([underscored(argument) for argument in arguments])
        if namespace.help:
            self.show_help()
        return settings_from(namespace, cls), rest

    def add_settings(self, title: str, cls: type[Any]) -> None:
        """Add a flag for every field of a settings dataclass. Without the flag its value is None."""
        group = self.add_argument_group(title)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            group.add_argument(f"--{field.name}", **_options(field, hints[field.name]))


def settings_from(namespace: argparse.Namespace, cls: type[Settings]) -> Settings:
    """Return an instance of a settings class from parsed arguments. Raise ConfigError for an invalid value."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {name: getattr(namespace, name) for name in names}
    return validated(cls, {name: value for name, value in values.items() if value is not None})


def _parser(method: type[methods.Method] | None) -> Parser:
    parser = Parser(
        "train", "Train a backbone by multi-view self-supervision. Without --data_path: the embedded digits."
    )
    parser.add_argument("--method", metavar="M", help="one of " + ", ".join(methods.names()))
    parser.add_argument(
        "--entropy", nargs="?", const=True, type=_boolean, help="train the entropy-reconstruction twin of the method"
    )
    parser.add_argument("--recipe", metavar="NAME", help="a set of published or tested values; list shows them all")
    parser.add_argument("--config", metavar="FILE", help="YAML file, such as the config.yaml of a run")
    parser.add_argument("--plugin", metavar="FILE.py", help="Python file that registers further methods; it is run")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers add it; the environment has it too
    parser.add_settings("trainer", TrainConfig)
    parser.add_settings("views", ViewFlags)
    parser.add_settings("pixels", PixelFlags)
    if method is not None:
        parser.add_settings(method.__name__, method.Settings)
    return parser


def _options(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for a field."""
    kind = _without_none(hint)
    default = "" if field.default is None else f" (default: {field.default})"
    options: dict[str, Any] = {"help": f"{field.metadata['help']}{default}"}
    if kind is bool:
        return options | {"nargs": "?", "const": True, "type": _boolean, "metavar": "true|false"}
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        count: int | str = ("*" if field.default == () else "+") if Ellipsis in items else len(items)
        return options | {"nargs": count, "type": {int: int, float: float}.get(items[0], str), "metavar": "X"}
    options["metavar"] = field.name.rpartition("_")[2].upper()
    if any(typing.get_origin(inner) is tuple for inner in typing.get_args(kind)):  # one or several
        return options | {"nargs": "+"}
    options["type"] = {int: int, float: float}.get(kind, _literal if typing.get_origin(kind) else str)
    return options


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # the latter if the type is annotated
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else hint
    return hint


def _literal(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
