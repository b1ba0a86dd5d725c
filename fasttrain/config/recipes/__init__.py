"""Published and tested values as YAML: ``<recipe>/<method>.yaml``, merged over the paper's, ``imagenet/<method>.yaml``.

Besides settings, a file has ``source`` (the origin of the values), ``published`` (the results they reached there) and,
if the twin needs other values, ``with_entropy``. ``<recipe>/common.yaml`` has the values that all methods share; its
``base`` names another recipe to merge over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PAPER = "imagenet"
"""The recipe that all others are merged over."""
_COMMON = "common"


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
    """Return the recipes that have values for this method."""
    paper = (_folder(PAPER) / f"{method}.yaml").is_file()
    return sorted(
        folder.name
        for folder in _folders()
        if (folder / f"{method}.yaml").is_file() or (paper and (folder / f"{_COMMON}.yaml").is_file())
    )


def recipe_layers(recipe: str, method: str, entropy: bool, *, like: str | None = None) -> list[dict[str, Any]]:
    """Return the paper's values, the recipe's, and last its ``with_entropy`` values if the run is the twin.

    ``like`` names a method whose files are used instead. Raise ValueError for a recipe that the method does not have.
    """
    source = like or method
    known = recipe_names(source)
    if recipe not in known:
        raise ValueError(f"--recipe: {recipe!r} is unknown for {method}. Choose one of {', '.join(known)}.")
    layers = []
    for name in dict.fromkeys((PAPER, *_bases(recipe), recipe)):
        values = _read(name, source)
        twin = values.pop("with_entropy", {})
        for key in ("source", "published"):
            values.pop(key, None)
        layers += [values, twin] if entropy and (name != PAPER or recipe == PAPER) else [values]
    return layers


def entries() -> list[Entry]:
    """Return all recipes, sorted by method."""
    rows = []
    for folder in _folders():
        for method in _methods(folder):
            merged: dict[str, Any] = {"arch": "vit_small", "epochs": 100}
            for name in (PAPER, *_bases(folder.name), folder.name):
                merged |= _read(name, method)
            fields = {name: merged[name] for name in ("arch", "epochs", "source", "published")}
            rows.append(Entry(folder.name, method, **fields))
    return sorted(rows, key=lambda entry: (entry.method, entry.recipe))


def _folder(recipe: str) -> Path:
    return Path(__file__).parent / recipe


def _folders() -> list[Path]:
    return [path for path in Path(__file__).parent.iterdir() if path.is_dir() and not path.name.startswith("_")]


def _methods(folder: Path) -> list[str]:
    """Return the methods of a recipe: all of the paper's if it has values that all methods share."""
    shared = (folder / f"{_COMMON}.yaml").is_file()
    return [file.stem for file in (_folder(PAPER) if shared else folder).glob("*.yaml")]


def _bases(recipe: str) -> list[str]:
    """Return the recipes, other than the paper's, that a recipe is merged over."""
    base = _load(_folder(recipe) / f"{_COMMON}.yaml").get("base")
    return [] if base is None else [*_bases(base), base]


def _read(recipe: str, method: str) -> dict[str, Any]:
    """Return a recipe's values for a method: the shared ones, replaced by its own."""
    values = _load(_folder(recipe) / f"{_COMMON}.yaml") | _load(_folder(recipe) / f"{method}.yaml")
    values.pop("base", None)
    return values


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content
