"""Everything public, name by name, against the committed ``public_api.txt``: no change is unnoticed."""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import typing
from pathlib import Path

from fasttrain import methods
from fasttrain.cli import _COMMANDS, eval, export, plan, report, source, views
from fasttrain.config import arguments
from fasttrain.config.settings import PixelFlags, TrainConfig, ViewFlags

_SNAPSHOT = Path(__file__).with_name("public_api.txt")
_MODULES = (
    "fasttrain",
    "fasttrain.losses",
    "fasttrain.losses.compat.dino",
    "fasttrain.losses.compat.info_nce",
    "fasttrain.losses.compat.open_clip",
    "fasttrain.kernels",
    "fasttrain.methods",
    "fasttrain.pipelines",
)
_OPTIONS = {
    "eval": (source.SourceOptions, eval.EvalOptions),
    "export": (source.SourceOptions, export.ExportOptions),
    "plan": (plan.PlanOptions,),
    "report": (report.ReportOptions,),
    "views": (views.ViewsOptions,),
    "train": (TrainConfig, ViewFlags, PixelFlags),
}
_UPDATE = "python -m tests.test_public_api"


def test_public_api_equals_the_snapshot():
    published, current = _SNAPSHOT.read_text().splitlines(), public_api()
    changes = [line for line in difflib.ndiff(published, current) if line[0] in "+-"]
    assert not changes, "\n".join([f"the public interface changed. If this is intended: {_UPDATE}, commit", *changes])


def test_snapshot_shows_changed_names_defaults_and_kinds():
    def before(x, *, scale=1.0): ...
    def other_name(x, *, gain=1.0): ...
    def other_default(x, *, scale=2.0): ...
    def other_kind(x, scale=1.0): ...

    lines = [_signature(function) for function in (before, other_name, other_default, other_kind)]
    assert lines[0] == "(x, *, scale=1.0)"
    assert len(set(lines)) == 4


def public_api():
    """Return a line per function, class, member and flag, without annotations."""
    lines = [line for name in _MODULES for line in _of_module(name)]
    lines += [f"fasttrain {command}" for command in _COMMANDS]
    lines += [f"fasttrain train {_flag(action)}" for action in _flags_without_settings()]
    for command, classes in _OPTIONS.items():
        lines += [line for cls in classes for line in _settings(command, cls)]
    for name in methods.registry.BUILT_IN:
        lines += _settings(f"train --method {name}", methods.load(name).Settings)
    return lines


def _of_module(name):
    module = importlib.import_module(name)
    for public in sorted(module.__all__):
        value, path = getattr(module, public), f"{name}.{public}"
        if inspect.isclass(value):
            yield from _of_class(path, value)
        else:
            yield path + (_signature(value) if inspect.isroutine(value) else "")


def _of_class(path, cls):
    """Yield the constructor, then the members of this class and of its base classes here."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("fasttrain")]
    constructed = any("__init__" in vars(base) for base in bases) and not getattr(cls, "_is_protocol", False)
    yield f"class {path}" + (_signature(cls) if constructed else "")
    members = {name for base in bases for name in [*vars(base), *inspect.get_annotations(base)]}
    for name in sorted(members):
        if not name.startswith("_"):
            value = getattr(cls, name, None)
            is_function = inspect.isroutine(value) and callable(value)  # not a cached property
            yield f"{path}.{name}" + (_signature(value) if is_function else "")


def _signature(value):
    signature = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _flags_without_settings():
    """Return the flags of train that are no settings."""
    names = {field.name for cls in _OPTIONS["train"] for field in dataclasses.fields(cls)}
    return [action for action in arguments._parser(None)._actions if action.dest not in names]


def _flag(action):
    values = {"nargs": action.nargs, "choices": action.choices and tuple(action.choices), "default": action.default}
    parts = [f"{key}={value!r}" for key, value in values.items() if value not in (None, argparse.SUPPRESS)]
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
