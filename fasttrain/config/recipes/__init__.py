"""Published and tested values as YAML: ``<recipe>/<method>.yaml``, merged over the paper's, ``imagenet/<method>.yaml``.

Besides settings, a file has ``source`` (the origin of the values), ``published`` (the results they reached there) and,
if the twin needs other values, ``with_entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PAPER = "imagenet"
"""The recipe that all others are merged over."""


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
    """Return the recipes that have a file for this method."""
    return sorted(folder.name for folder in _folders() if (folder / f"{method}.yaml").is_file())


def recipe_layers(recipe: str, method: str, entropy: bool, *, like: str | None = None) -> list[dict[str, Any]]:
    """Return the paper's values, the recipe's, and last its ``with_entropy`` values if the run is the twin.

    ``like`` names a method whose files are used instead. Raise ValueError for a recipe that the method does not have.
    """
    source = like or method
    known = recipe_names(source)
    if recipe not in known:
        raise ValueError(f"--recipe: {recipe!r} is unknown for {method}. Choose one of {', '.join(known)}.")
    layers = []
    for name in dict.fromkeys((PAPER, recipe)):
        values = _read(name, source)
        twin = values.pop("with_entropy", {})
        for key in ("source", "published"):
            values.pop(key, None)
        layers += [values, twin] if entropy and name == recipe else [values]
    return layers


def entries() -> list[Entry]:
    """Return all recipes, sorted by method."""
    rows = []
    for folder in _folders():
        for method in (file.stem for file in folder.glob("*.yaml")):
            merged: dict[str, Any] = {"arch": "vit_small", "epochs": 100}
            merged |= _read(PAPER, method) | _read(folder.name, method)
            fields = {name: merged[name] for name in ("arch", "epochs", "source", "published")}
            rows.append(Entry(folder.name, method, **fields))
    return sorted(rows, key=lambda entry: (entry.method, entry.recipe))


def _folders() -> list[Path]:
    return [path for path in Path(__file__).parent.iterdir() if path.is_dir() and not path.name.startswith("_")]


def _read(recipe: str, method: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / recipe / f"{method}.yaml").read_text())
    return content
