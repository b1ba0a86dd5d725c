"""The registry of methods: built-in ones, and methods of installed packages and of plugin files."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from ..errors import ConfigError
from ..flags import user_path
from .base import Method

BUILT_IN = (
    "barlow",
    "byol",
    "cmc",
    "deepcluster",
    "dino",
    "dinov2",
    "ibot",
    "infomin",
    "lejepa",
    "moco",
    "mocov3",
    "simclr",
    "simdino",
    "simsiam",
    "swav",
    "vicreg",
)
"""Method ``name`` is registered by the module ``fasttrain.methods.name``, which is imported at its first use."""
GROUP = "fasttrain.methods"
"""The entry-point group in which a package lists its methods as ``name = "package.module:Class"``."""

_registered: dict[str, type[Method]] = {}
MethodClass = TypeVar("MethodClass", bound=type[Method])


def register(name: str) -> Callable[[MethodClass], MethodClass]:
    """Return a class decorator that registers a method under a name for ``--method`` and :func:`fasttrain.train`.

    A notebook cell may run it again: a class of the same module and name replaces the former. Raise ValueError for a
    name that another class has, and for a class that cannot be trained.
    """

    def decorate(cls: MethodClass) -> MethodClass:
        _check_class(name, cls)
        former = _registered.get(name)
        if former is not None and (former.__module__, former.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"method {name!r} is registered already, by {former.__module__}.{former.__qualname__}")
        if name in BUILT_IN and cls.__module__ != f"{__package__}.{name}":
            raise ValueError(f"method {name!r} is built in; choose another name")
        _registered[name] = cls
        return cls

    return decorate


def _check_class(name: str, cls: type[Method]) -> None:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"register: the name must be of letters, digits, '.', '-' and '_', got {name!r}")
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ValueError(f"register: method {name!r} must be a subclass of Method, got {cls!r}")
    if not dataclasses.is_dataclass(getattr(cls, "Settings", None)):
        raise ValueError(f"{cls.__name__}.Settings: must be a dataclass with the settings of method {name!r}")
    if cls.recipes is not None and cls.recipes not in BUILT_IN:
        raise ValueError(f"{cls.__name__}.recipes: must be one of {', '.join(BUILT_IN)}, got {cls.recipes!r}")


def names() -> list[str]:
    """Return the names of all methods that can be loaded, sorted."""
    return sorted({*BUILT_IN, *_registered, *(entry.name for entry in entry_points(group=GROUP))})


def load(name: str) -> type[Method]:
    """Return the class of a method. Raise ValueError for an unknown name or an entry point that is no Method."""
    if not isinstance(name, str):
        raise ValueError(f"--method: must be a name, got {name!r}. Choose one of {', '.join(names())}.")
    if name not in _registered and name in BUILT_IN:
        importlib.import_module(f".{name}", __package__)
    if name not in _registered:
        for entry in entry_points(group=GROUP, name=name):
            try:
                register(name)(entry.load())
            except ValueError as error:
                raise ValueError(f"--method: entry point {entry.value}: {error}") from None
    if name not in _registered:
        raise ValueError(f"--method: {name!r} is unknown. Choose one of {', '.join(names())}.")
    return _registered[name]


def name_of(method: str | type[Method]) -> str:
    """Return the name of a method, or of a registered class. Raise ConfigError for a class that is not registered."""
    if isinstance(method, str):
        return method
    if not isinstance(method, type):
        raise ConfigError(f"method: must be a name or a registered class, got {method!r}.")
    name = next((name for name, cls in _registered.items() if cls is method), None)
    if name is None:
        raise ConfigError(f'method: {method.__name__} is not registered. Decorate it with @register("name").')
    return name


def load_plugin(path: str | os.PathLike[str]) -> None:
    """Run a Python file that registers methods. The file runs with the rights of the user.

    Raise ConfigError if it cannot be run or registers nothing.
    """
    path, before = user_path(path), dict(_registered)
    module_name = f"fasttrain_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if not path.is_file():
        raise ConfigError(f"--plugin {path}: no such file. Give the path of a .py file.")
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path}: is not a Python file. Give the path of a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file's own code raises whatever it raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"--plugin {path}: {reason}. Fix the file.") from error
    if _registered == before and not any(cls.__module__ == module_name for cls in before.values()):
        raise ConfigError(f'--plugin {path}: registers no method. Decorate a class with @register("name").')
