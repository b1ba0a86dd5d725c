"""A run as its folder tells it: finished, under way, stopped before its end, or hardly begun."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.card import Card, newest, read_card
from ..config.resolve import Config, read_yaml, resolve
from ..errors import ConfigError
from ..training.records import read_summary

_DIGITS = "the embedded digits"


@dataclass(frozen=True)
class Run:
    """What is known about a run."""

    path: Path
    name: str
    """By which the report calls it: the folder's name, with as many of its parents as tell it from the others."""
    lines: tuple[dict[str, Any], ...]
    """The lines of metrics.jsonl, in the order of their steps."""
    summary: dict[str, Any] | None
    """summary.json; None if the run has not finished."""
    config: Config | None
    """None where config.yaml is missing or cannot be used."""
    text: str
    """config.yaml as it stands; empty where it is missing."""
    card: Card | None
    """Of the newest complete checkpoint."""
    notes: tuple[str, ...] = ()
    """What is missing or broken, for people."""

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) of every logged step that has a finite value."""
        with_both = [line for line in self.lines if _is_number(line.get("epoch")) and _is_number(line.get(key))]
        return [(float(line["epoch"]), float(line[key])) for line in with_both]

    def last(self, key: str) -> Any:
        """The summary's value, or that of the last logged step that has one."""
        if self.summary is not None and self.summary.get(key) is not None:
            return self.summary[key]
        return next((line[key] for line in reversed(self.lines) if line.get(key) is not None), None)

    @property
    def steps(self) -> int:
        """Steps of which something is known to be done."""
        return int(max([line.get("step", 0) for line in self.lines] + [(self.summary or {}).get("steps", 0)]))

    @property
    def state(self) -> str:
        """Whether it finished, and how far it came."""
        collapsed = ", collapsed" if (self.summary or {}).get("collapsed") else ""
        if self.summary is not None and self.summary.get("steps", 0) >= self.steps:
            return f"finished: {self.steps:,} steps{collapsed}"
        if not self.lines:
            return "never finished: no step was logged"
        return f"never finished: {self.steps:,}{self._of_steps()} steps"

    def _of_steps(self) -> str:
        last = self.lines[-1]
        if self.config is None or not last.get("epoch") or not last.get("step"):
            return ""
        t = self.config.train
        total = round(t.epochs * last["step"] / last["epoch"])
        return f" of {min(total, t.limit_steps or total):,}"

    @property
    def data(self) -> str:
        """The images that it is trained and evaluated on, as far as paths tell."""
        if self.config is None:
            return str((self.summary or {}).get("dataset", "unknown data"))
        t = self.config.train
        held_out = f", {t.val_path} held out" if t.val_path else ""
        return (t.data_path or _DIGITS) + held_out


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders; one that is given twice counts once.

    Raises ConfigError for a folder that holds no run, and where none of them has logged a step.
    """
    folders = list(dict.fromkeys(path.expanduser().resolve() for path in paths))
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if not any(run.lines for run in runs):
        what = "has" if len(runs) == 1 else "have"
        raise ConfigError(f"{', '.join(map(str, paths))} {what} logged no step; let it train on, or choose another run")
    return runs


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder. Raises ConfigError where there is none."""
    metrics, settings = folder / "metrics.jsonl", folder / "config.yaml"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run; give the folder that a training wrote (--output_dir)")
    if not metrics.is_file() and not settings.is_file():
        raise ConfigError(f"{folder} holds no run: neither metrics.jsonl nor config.yaml is in it")
    lines, notes = _metrics(metrics)
    config, text = None, ""
    try:
        values = read_yaml(settings)
        text = settings.read_text()
        config = resolve(str(values.get("method")), {}, values)
    except ConfigError as error:
        notes.append(f"config.yaml cannot be used ({str(error).removeprefix('--config ')})")
    try:
        card = read_card(newest(folder))
    except ConfigError:
        card = None
        notes.append("no complete checkpoint, so nothing is known of its network but what was logged")
    summary = read_summary(folder)
    if summary is None and (folder / "summary.json").exists():
        notes.append("summary.json cannot be read, so whether it finished is unknown")
    return Run(folder, name, tuple(lines), summary, config, text, card, tuple(notes))


def _metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines that are whole, and a note where some are not."""
    if not path.is_file():
        return [], []
    lines, broken = [], 0
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and _is_number(line.get("step")):
            lines.append(line)
        else:
            broken += 1
    return lines, [f"{broken} of the lines of metrics.jsonl cannot be read and are left out"] if broken else []


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    for length in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
