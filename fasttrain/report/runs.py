"""Read a run from its folder, whether it finished or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.card import Card, newest, read_card
from ..config.resolve import Config, read_yaml, resolve
from ..errors import ConfigError
from ..flags import user_path
from ..training.records import is_number, read_lines, read_summary

_DIGITS = "the embedded digits"


@dataclass(frozen=True)
class Run:
    """The content of a run's folder."""

    path: Path
    name: str
    """Name in the report: the end of the path that distinguishes it from the other runs."""
    lines: tuple[dict[str, Any], ...]
    """The lines of metrics.jsonl, in the order of their steps."""
    summary: dict[str, Any] | None
    """summary.json; None if the run has not finished."""
    config: Config | None
    """None if config.yaml is missing or invalid."""
    text: str
    """The text of config.yaml; empty if it is missing."""
    card: Card | None
    """The card of the newest complete checkpoint."""
    notes: tuple[str, ...] = ()
    """Missing or invalid files, as text for the reader."""

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Return (epoch, value) of every logged step with a finite value."""
        with_both = [line for line in self.lines if is_number(line.get("epoch")) and is_number(line.get(key))]
        return [(float(line["epoch"]), float(line[key])) for line in with_both]

    def last(self, key: str) -> Any:
        """Return the summary's value, or the value of the last logged step that has one."""
        if self.summary is not None and self.summary.get(key) is not None:
            return self.summary[key]
        return next((line[key] for line in reversed(self.lines) if line.get(key) is not None), None)

    @property
    def steps(self) -> int:
        """Number of the last known step."""
        return int(max([line.get("step", 0) for line in self.lines] + [(self.summary or {}).get("steps", 0)]))

    @property
    def state(self) -> str:
        """Whether the run finished, and its number of steps."""
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
        """The paths of the images for training and evaluation."""
        if self.config is None:
            return str((self.summary or {}).get("dataset", "unknown data"))
        t = self.config.train
        held_out = f", {' + '.join(t.val_paths)} held out" if t.val_paths else ""
        return (" + ".join(t.data_paths) or _DIGITS) + held_out


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the runs in these folders, each folder once.

    Raise ConfigError for a folder without a run, and if no run has logged a step.
    """
    folders = list(dict.fromkeys(user_path(path).resolve() for path in paths))
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if not any(run.lines for run in runs):
        raise ConfigError(
            f"{', '.join(map(str, paths))}: no step is logged. Resume the training or choose another run."
        )
    return runs


def read_run(folder: Path, name: str) -> Run:
    """Return the run in a folder. Raise ConfigError if there is none."""
    metrics, settings = folder / "metrics.jsonl", folder / "config.yaml"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such run. Give the --output_dir of a training.")
    if not metrics.is_file() and not settings.is_file():
        raise ConfigError(f"{folder}: is no run, because it has no metrics.jsonl and no config.yaml.")
    lines, damaged = read_lines(metrics) if metrics.is_file() else ([], 0)
    notes = [f"{damaged} lines of metrics.jsonl are invalid and left out"] if damaged else []
    config, text = None, ""
    try:
        values = read_yaml(settings)
        text = settings.read_text()
        config = resolve(str(values.get("method")), {}, values)
    except ConfigError as error:
        notes.append(f"config.yaml is invalid ({str(error).removeprefix('--config ')})")
    try:
        card = read_card(newest(folder))
    except ConfigError:
        card = None
        notes.append("no complete checkpoint, so only logged values are shown")
    summary = read_summary(folder)
    if summary is None and (folder / "summary.json").exists():
        notes.append("summary.json cannot be read, so it is unknown whether the run finished")
    return Run(folder, name, tuple(lines), summary, config, text, card, tuple(notes))


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that all differ."""
    for length in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names
