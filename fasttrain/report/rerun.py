"""How to run it again: the shortest command that gives the same configuration, and what differs between runs."""

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
from ..pipelines import ViewRecipe
from .charts import NOTHING
from .runs import Run

_ELSEWHERE = ("output_dir",)
"""Another run of the same kind has its own."""


def command(run: Run) -> str | None:
    """The command that trains as the run did, into a new folder; None without a configuration or a path.

    Flags say what is not in the recipe already. What flags cannot say, as a list of views, is read from config.yaml.
    """
    if run.config is None or run.config.train.in_memory:
        return None
    words = _flags(run.config)
    try:
        exact = words is not None and _flat(parse(words)[0]) == _flat(run.config)
    except ConfigError:  # say, a recipe that has changed since
        exact = False
    if words is None or not exact:
        words = ["--config", str(run.path / "config.yaml"), "--output_dir", f"{run.path}-again"]
    ranks = (run.summary or {}).get("world_size") or (run.card.world_size if run.card else 1)
    launcher = ["torchrun", "--nproc_per_node", str(ranks), "--no-python"] if ranks > 1 else []
    return shlex.join([*launcher, "fasttrain", "train", *words])


def _flags(config: Config) -> list[str] | None:
    """Every setting that is not the recipe's, as a flag; None where one has no form as a flag."""
    t = config.train
    given = {"recipe": config.recipe, "data_path": t.data_path, "entropy": config.entropy}
    base = resolve(config.method, {name: value for name, value in given.items() if value is not None})
    words = ["--method", config.method, *(["--entropy"] if config.entropy else [])]
    words += [] if config.plugin is None else ["--plugin", config.plugin]
    if resolve(config.method, {} if t.data_path is None else {"data_path": t.data_path}).recipe != config.recipe:
        words += ["--recipe", config.recipe]
    words += [] if t.data_path is None else ["--data_path", t.data_path]
    for ours, usual in ((config.train, base.train), (config.settings, base.settings)):
        for field in dataclasses.fields(ours):
            value = getattr(ours, field.name)
            if field.name in (*_ELSEWHERE, "data_path") or value == getattr(usual, field.name):
                continue
            if value is None:
                return None
            words += _flag(field.name, value)
    return words + _view_flags(config.views, base.views)


def _view_flags(ours: ViewRecipe, usual: ViewRecipe) -> list[str]:
    """DINO's five, where they may be what makes the difference; whether they are is seen when they are read back."""
    words = []
    for kind in ("global", "local"):
        mine, theirs = ([view for view in r.views if view.local == (kind == "local")] for r in (ours, usual))
        if theirs and not mine:
            words += _flag(f"{kind}_crops_number", 0)
        for name, flag in (("size", "size"), ("scale", "scale"), ("count", "number")):
            values = {getattr(view, name) for view in mine}
            if len(values) == 1 and values != {getattr(view, name) for view in theirs}:
                words += _flag(f"{kind}_crops_{flag}", *values)
    return words


def _flag(name: str, value: Any) -> list[str]:
    given = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *([] if value is True else [str(v).lower() if v is False else str(v) for v in given])]


def differences(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a table: the settings in which runs differ or, of a single one, those not its recipe's.

    A method's own settings count among the runs that have them.
    """
    configs = [run.config for run in runs if run.config is not None]
    if len(configs) == 1:
        (config,) = configs
        values: dict[str, Any] = {"recipe": config.recipe, "entropy": config.entropy}
        values |= {} if config.train.data_path is None else {"data_path": config.train.data_path}
        try:
            configs = [config, resolve(config.method, values)]
        except ConfigError:  # a recipe that is no more
            return [], []
        names = ["this run", f"recipe {config.recipe}"]
    else:
        names = [run.name for run in runs if run.config is not None]
    flat = [_flat(config) for config in configs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [[key, *(_shown(one, key) for one in flat)] for key in keys]
    return ["setting", *names], [row for row in rows if len({*row[1:]} - {NOTHING}) > 1]


def _flat(config: Config) -> dict[str, Any]:
    """Every setting by its name, whichever folder the run is written to; of views each field."""
    flat: dict[str, Any] = yaml.safe_load(config.to_yaml())
    views = flat.pop("views")
    flat["views"] = ", ".join(f"{view['count']} of {view['size']} px" for view in views)
    flat |= {f"views[{i}].{name}": value for i, view in enumerate(views) for name, value in view.items()}
    return {name: value for name, value in flat.items() if name not in _ELSEWHERE}


def _shown(flat: dict[str, Any], key: str) -> str:
    value = flat.get(key, NOTHING)
    return value if isinstance(value, str) else json.dumps(value)
