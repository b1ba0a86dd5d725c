"""The shortest command that repeats a run, and the settings that differ between runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from ..config.arguments import parse
from ..config.resolve import Config, resolve
from ..errors import ConfigError
from ..pipelines import ViewRecipe, size_text
from .charts import NOTHING
from .runs import Run

_PER_RUN = ("output_dir",)
"""Settings that differ when a run is repeated."""


def command(run: Run) -> str | None:
    """Return the command that repeats the run in a new folder, or None without a configuration or a data path.

    Its flags are the settings that differ from the recipe. If flags cannot express them, for example a list of views,
    it reads the run's config.yaml.
    """
    if run.config is None or run.config.train.in_memory:
        return None
    words = _flags(run.config)
    try:
        exact = words is not None and _flat(parse(words)[0]) == _flat(run.config)
    except ConfigError:  # for example, the recipe has changed since
        exact = False
    if words is None or not exact:
        words = ["--config", str(run.path / "config.yaml"), "--output_dir", f"{run.path}-again"]
    ranks = (run.summary or {}).get("world_size") or (run.card.world_size if run.card else 1)
    launcher = ["torchrun", "--nproc_per_node", str(ranks), "--no-python"] if ranks > 1 else []
    return shlex.join([*launcher, "fasttrain", "train", *words])


def _flags(config: Config) -> list[str] | None:
    """Return every setting that differs from the recipe as a flag, or None if one cannot be a flag."""
    t = config.train
    values = {"recipe": config.recipe, "data_path": t.data_path, "entropy": config.entropy}
    base = resolve(config.method, {name: value for name, value in values.items() if value is not None})
    words = ["--method", config.method, *(["--entropy"] if config.entropy else [])]
    words += [] if config.plugin is None else ["--plugin", config.plugin]
    if resolve(config.method, {} if t.data_path is None else {"data_path": t.data_path}).recipe != config.recipe:
        words += ["--recipe", config.recipe]
    words += ["--data_path", *t.data_paths] if t.data_paths else []
    for ours, usual in ((config.train, base.train), (config.settings, base.settings)):
        for field in dataclasses.fields(ours):
            value = getattr(ours, field.name)
            if field.name in (*_PER_RUN, "data_path") or value == getattr(usual, field.name):
                continue
            if value is None:
                return None
            words += _flag(field.name, value)
    return words + _view_flags(config.views, base.views)


def _view_flags(ours: ViewRecipe, usual: ViewRecipe) -> list[str]:
    """Return DINO's five flags as far as they may express the difference. The caller parses them to verify it."""
    words = []
    for kind in ("global", "local"):
        run, recipe = ([view for view in r.views if view.local == (kind == "local")] for r in (ours, usual))
        if recipe and not run:
            words += _flag(f"{kind}_crops_number", 0)
        for name, flag in (("size", "size"), ("scale", "scale"), ("count", "number")):
            values = {getattr(view, name) for view in run}
            if len(values) == 1 and values != {getattr(view, name) for view in recipe}:
                words += _flag(f"{kind}_crops_{flag}", *values)
    return words


def _flag(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *([] if value is True else [str(v).lower() if v is False else str(v) for v in values])]


def differences(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a table: settings that differ between runs, or between one run and its recipe.

    A setting that only one method has is compared among the runs that have it.
    """
    configs = [run.config for run in runs if run.config is not None]
    if len(configs) == 1:
        (config,) = configs
        values: dict[str, Any] = {"recipe": config.recipe, "entropy": config.entropy}
        values |= {} if config.train.data_path is None else {"data_path": config.train.data_path}
        try:
            configs = [config, resolve(config.method, values)]
        except ConfigError:  # the recipe does not exist any more
            return [], []
        names = ["this run", f"recipe {config.recipe}"]
    else:
        names = [run.name for run in runs if run.config is not None]
    flat = [_flat(config) for config in configs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [[key, *(_shown(one, key) for one in flat)] for key in keys]
    return ["setting", *names], [row for row in rows if len({*row[1:]} - {NOTHING}) > 1]


def _flat(config: Config) -> dict[str, Any]:
    """Return every setting by name, with one entry per field of each view, without the output folder."""
    flat: dict[str, Any] = yaml.safe_load(config.to_yaml())
    views = flat.pop("views")
    flat["views"] = ", ".join(f"{view['count']} of {_size(view['size'])} px" for view in views)
    flat |= {f"views[{i}].{name}": value for i, view in enumerate(views) for name, value in view.items()}
    return {name: value for name, value in flat.items() if name not in _PER_RUN}


def _size(size: int | list[int]) -> str:
    return size_text(size if isinstance(size, int) else (size[0], size[1]))


def _shown(flat: dict[str, Any], key: str) -> str:
    value = flat.get(key, NOTHING)
    return value if isinstance(value, str) else json.dumps(value)
