"""What others import and type, name by name, beside the committed ``public_api.txt``: nothing public changes unseen."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import os
import typing
from pathlib import Path
from unittest import mock

from fasttrain import cli, methods
from fasttrain.config.settings import TrainConfig

_SNAPSHOT = Path(__file__).with_name("public_api.txt")
_MODULES = (
    "fasttrain",
    "fasttrain.losses",
    "fasttrain.losses.compat.dino",
    "fasttrain.losses.compat.info_nce",
    "fasttrain.losses.compat.open_clip",
    "fasttrain.kernels",
    "fasttrain.pipelines",
)
_MEND = "python -m tests.test_public_api"


def test_what_is_public_is_what_was_published():
    published, found = _SNAPSHOT.read_text().splitlines(), public_api()
    changes = [line for line in difflib.ndiff(published, found) if line[0] in "+-"]
    assert not changes, "\n".join([f"the public interface changed; if that is meant: {_MEND}, and commit", *changes])


def test_a_change_of_a_name_a_default_or_a_kind_shows():
    def before(x, *, scale=1.0): ...
    def other_name(x, *, gain=1.0): ...
    def other_default(x, *, scale=2.0): ...
    def other_kind(x, scale=1.0): ...

    drawn = [_signature(function) for function in (before, other_name, other_default, other_kind)]
    assert drawn[0] == "(x, *, scale=1.0)"
    assert len(set(drawn)) == 4


def public_api():
    """A line for each function, each class and its members, and each flag of each subcommand; no annotations."""
    lines = [line for name in _MODULES for line in _of_module(name)]
    lines += [line for command in ("eval", "export", "plan", "report") for line in _of_command(command)]
    lines += [f"fasttrain train {line}" for line in _without_settings(_parser("train"))]
    lines += _settings("train", TrainConfig)
    for name in methods.names():
        lines += _settings(f"train --method {name}", methods.load(name).Settings)
    return lines


def _of_module(name):
    module = importlib.import_module(name)
    for public in sorted(module.__all__):
        value, path = getattr(module, public), f"{name}.{public}"
        if inspect.isclass(value):
            yield from _of_class(path, value)
        else:
            yield path + (_signature(value) if callable(value) else "")


def _of_class(path, cls):
    """The constructor, then what this class and those of ours above it define."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("fasttrain")]
    made = any("__init__" in vars(base) for base in ours) and not getattr(cls, "_is_protocol", False)
    yield f"class {path}" + (_signature(cls) if made else "")
    members = {name for base in ours for name in [*vars(base), *inspect.get_annotations(base)]}
    for name in sorted(members):
        if not name.startswith("_"):
            value = getattr(cls, name, None)
            yield f"{path}.{name}" + (_signature(value) if inspect.isroutine(value) else "")


def _signature(value):
    signature = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _of_command(command):
    return [f"fasttrain {command} {line}" for line in map(_flag, _parser(command)._actions)]


def _parser(command):
    """The parser that the command asks first, with which it would print its help."""
    seen, parse = [], argparse.ArgumentParser.parse_known_args

    def noted(parser, *arguments, **options):
        seen.append(parser)
        return parse(parser, *arguments, **options)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", noted),
        mock.patch.dict(os.environ, XDG_CACHE_HOME="~/.cache"),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        cli.main([command, "--help"])
    return seen[0]


def _without_settings(parser):
    """The flags that are no field of the configuration: those have their defaults there."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    return [_flag(action) for action in parser._actions if action.dest not in fields]


def _flag(action):
    told = {"nargs": action.nargs, "choices": action.choices and tuple(action.choices), "default": action.default}
    parts = [f"{key}={value!r}" for key, value in told.items() if value not in (None, argparse.SUPPRESS)]
    return " ".join([*(action.option_strings or [action.dest]), *parts])


def _settings(command, cls):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        choices = _choices(hints[field.name])
        limited = f" choices={choices}" if choices else ""
        yield f"fasttrain {command} --{field.name}{limited} default={field.default!r}"


def _choices(hint):
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return next(filter(None, map(_choices, typing.get_args(hint))), None)


if __name__ == "__main__":
    _SNAPSHOT.write_text("\n".join(public_api()) + "\n")
