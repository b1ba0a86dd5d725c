"""Published and tried values as YAML: ``<recipe>/<method>.yaml``, laid over the paper's, ``imagenet/<method>.yaml``.

Beside settings a file has ``source`` (where the values are from), ``published`` (what they reached there) and, where
the twin needs other values, ``with_entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PAPER = "imagenet"
"""The recipe on which all others are laid."""


@dataclass(frozen=True)
class Entry:
    """A line of ``--recipe list``."""

    recipe: str
    method: str
    arch: str
    epochs: int
    source: str
    published: str


def recipe_names(method: str) -> list[str]:
    """The recipes that have a file for this method."""
    return sorted(folder.name for folder in _folders() if (folder / f"{method}.yaml").is_file())


def recipe_layers(recipe: str, method: str, entropy: bool) -> list[dict[str, Any]]:
    """The paper's values and over them the recipe's, those ``with_entropy`` last if it is the twin.

    Raises ValueError for a recipe that the method does not have.
    """
    known = recipe_names(method)
    if recipe not in known:
        raise ValueError(f"recipe {recipe!r} is unknown for {method}; choose one of {', '.join(known)}")
    layers = []
    for name in dict.fromkeys((PAPER, recipe)):
        values = _read(name, method)
        twin = values.pop("with_entropy", {})
        for key in ("source", "published"):
            values.pop(key, None)
        layers += [values, twin] if entropy and name == recipe else [values]
    return layers


def entries() -> list[Entry]:
    """All recipes, by method."""
    found = []
    for folder in _folders():
        for method in (file.stem for file in folder.glob("*.yaml")):
            merged: dict[str, Any] = {"arch": "vit_small", "epochs": 100}
            merged |= _read(PAPER, method) | _read(folder.name, method)
            fields = {name: merged[name] for name in ("arch", "epochs", "source", "published")}
            found.append(Entry(folder.name, method, **fields))
    return sorted(found, key=lambda entry: (entry.method, entry.recipe))


def _folders() -> list[Path]:
    return [path for path in Path(__file__).parent.iterdir() if path.is_dir() and not path.name.startswith("_")]


def _read(recipe: str, method: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / recipe / f"{method}.yaml").read_text())
    return content
