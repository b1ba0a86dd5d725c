"""The methods: one paper a file, found by the file's name."""

from __future__ import annotations

import importlib
import pkgutil

from .base import Method as Method

_SHARED = {"base", "bound", "kmeans"}


def names() -> list[str]:
    """The methods that ``--method`` takes: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def load(name: str) -> type[Method]:
    """The class that ``methods/<name>.py`` defines. Raises ValueError for a name that is no method."""
    if name not in names():
        raise ValueError(f"method {name!r} is unknown; choose one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    found = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return next(c for c in found if issubclass(c, Method))
