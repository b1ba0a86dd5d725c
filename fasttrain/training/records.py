"""The files of a run: metrics.jsonl, log.txt, TensorBoard events, summary.json."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ..config.resolve import Config
from ..distributed.world import World
from ..engine.engine import Engine
from ..errors import ConfigError
from ..files import check_writable, finite, write_text
from ..methods import Objective, Step
from .guard import Finding
from .monitors import spread
from .trackers import Tracker

BOUND = ("entropy", "entropy_max", "reconstruction", "information", "deficit")
"""The bound's values in a line of metrics.jsonl, in nats; null where a method has no bound."""
_STEP_KEYS = ("step", "epoch", "loss", "grad_norm", "skipped_steps", "lr", "weight_decay", "momentum")
_RATE_KEYS = ("images_per_s", "data_wait")
REFERENCE_KEYS = ("reference_knn_top1", "reference_cka", "reference_rankme")
"""Values on the reference set of continued pretraining."""
_EVALUATION_KEYS = ("channel_std", "effective_rank", "knn_top1", "rankme", *REFERENCE_KEYS)
TRAINER_KEYS = frozenset({*_STEP_KEYS, *_RATE_KEYS, *_EVALUATION_KEYS})
"""The other values of the trainer; all further ones are a method's own."""


def output_folder(config: Config, world: World) -> Path:
    """Return the folder of the run, the same on all ranks. Raise ConfigError if no file can be written there."""
    chosen = [config.train.output_dir or (_new_folder(config) if world.is_main else "")]
    if world.size > 1:
        dist.broadcast_object_list(chosen)
    path = Path(chosen[0])
    try:
        check_writable(path)
        if (path / "checkpoints").is_dir():
            check_writable(path / "checkpoints")
    except OSError as error:
        action = "written to" if path.is_dir() else "made"
        raise ConfigError(f"--output_dir {path}: cannot be {action}: {error.strerror}. Choose another.") from None
    return path


def _new_folder(config: Config) -> str:
    """Make a folder named by method and time. A second run within the same second gets its own."""
    name = f"{config.method}{'-er' if config.entropy else ''}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # output_folder meets it again on all ranks, and reports it
            pass
        break
    return str(path)


@dataclass
class Meter:
    """Images, time and waiting since the last logged step."""

    images: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def rates(self) -> dict[str, float]:
        """Return images per second, and the fraction of the time spent waiting for data."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        return {"images_per_s": self.images / elapsed, "data_wait": self.waited / elapsed}


def metrics_line(
    engine: Engine, step: Step, objective: Objective, finding: Finding, skipped: int, meter: Meter
) -> dict[str, Any]:
    """Return the line of metrics.jsonl of a measured step, averaged over ranks. Collective.

    Loss, bound and logs are means over the micro-batches too; the spread of the projections is the last micro-batch's.
    Raise ConfigError if a method logs a name that the trainer uses itself.
    """
    terms, bound, rows = dict(finding.terms), objective.bound, objective.projections
    shape: dict[str, float] = {}
    if rows is not None:
        local = spread(rows)
        shape = dict(zip(local, engine.mean(list(local.values())), strict=True))
    reserved = TRAINER_KEYS if bound is not None else {*TRAINER_KEYS, *BOUND}
    if taken := reserved & objective.logs.keys():
        raise ConfigError(f"Objective.logs: {min(taken)!r} is a name of the trainer. Choose another.")
    loss = terms.pop("loss")
    values: dict[str, float | None] = dict.fromkeys(BOUND)
    if bound is not None:
        entropy, reconstruction = terms["entropy"], terms["reconstruction"]
        values = {
            "entropy": entropy,
            "entropy_max": bound.entropy_max,
            "reconstruction": reconstruction,
            "information": entropy - reconstruction,
            "deficit": terms["deficit"],
        }
        own = {name: value for name, value in terms.items() if name not in values}
    else:
        own = terms
    return {
        "step": step.index + 1,
        "epoch": (step.position + 1) / step.per_epoch,
        "loss": loss,
        **values,
        **own,
        **shape,
        **engine.schedules(step),
        "grad_norm": finding.grad_norm,
        "skipped_steps": skipped,
        **meter.rates(),
    }


class Recorder:
    """Writes the files of one run; only rank 0 has one. Each line is flushed when it is written.

    A resumed run leaves out lines that cannot be read, for example after a power failure. ``note`` gets their number.
    ``trackers`` get the numbers as well. A tracker that fails during the run is left out from then on: its values are
    in metrics.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resumed_at: int = 0,
        trackers: Sequence[Tracker] = (),
        note: Callable[[str], None] = print,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.past = _drop_after(folder / "metrics.jsonl", resumed_at, note)
        """The lines of metrics.jsonl that an earlier part of this run wrote."""
        _drop_after(folder / "log.txt", resumed_at, note)
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._log = (folder / "log.txt").open("a", buffering=1)
        self._trackers, self._note = list(trackers), note

    def step(self, values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, and send the numbers to the trackers."""
        self._metrics.write(json.dumps(finite(values)) + "\n")
        self._track(values["step"], values)

    def extend_last(self, step: int, values: dict[str, Any]) -> None:
        """Add values to the newest line of metrics.jsonl, which is of this step, and send them to the trackers.

        The file is replaced at once: a process that is killed leaves the old line or the new one.
        """
        path = self.folder / "metrics.jsonl"
        before, last = _without_last_line(path.read_text())
        write_text(path, before + json.dumps(json.loads(last) | finite(values)) + "\n")
        self._metrics.close()
        self._metrics = path.open("a", buffering=1)
        self._track(step, values)

    def _track(self, step: int, values: dict[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if name not in ("step", "epoch") and value is not None}
        self._each(lambda tracker: tracker.log(step, numbers))

    def epoch(self, values: dict[str, Any]) -> None:
        """Write a line of log.txt, in DINO's form."""
        self._log.write(json.dumps(finite(values)) + "\n")

    def sync(self) -> None:
        """Flush the lines to the disk. A checkpoint must not be newer than its records after a power failure."""
        for file in (self._metrics, self._log):
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._log.close()
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except tracker.failures as error:
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split()) or type(error).__name__
                self._note(f"--trackers {tracker.name}: stopped, the run continues without it: {reason}")


def _without_last_line(text: str) -> tuple[str, str]:
    """Return a text of complete lines without its last line, and the last line."""
    before, _, last = text.rstrip("\n").rpartition("\n")
    return before + "\n" * bool(before), last


def epoch_line(epoch: int, step: int, values: list[dict[str, Any]]) -> dict[str, Any]:
    """Return DINO's line of log.txt: means over the epoch's logged steps."""
    names = [k for k in (values[-1] if values else {}) if k not in ("step", "epoch", "entropy_max")]
    means = {
        f"train_{k}": math.fsum(v[k] for v in values) / len(values)
        for k in names
        if all(isinstance(v.get(k), float) for v in values)
    }
    return {**means, "epoch": epoch, "step": step}


def write_summary(folder: Path, values: dict[str, Any]) -> None:
    """Write summary.json."""
    write_text(folder / "summary.json", json.dumps(finite(values), indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return the summary.json of a finished run, or None."""
    try:
        content = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of metrics.jsonl or log.txt that have a step, and the number of damaged lines."""
    lines, damaged = [], 0
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and is_number(line.get("step")):
            lines.append(line)
        else:
            damaged += 1
    return lines, damaged


def is_number(value: Any) -> bool:
    """Return whether a value of a log is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _drop_after(path: Path, step: int, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Remove the lines of steps that a resumed run repeats, and damaged lines; return the others."""
    if not path.is_file():
        return []
    lines, damaged = read_lines(path)
    if damaged and step:
        note(f"{path}: {damaged:,} damaged {'line' if damaged == 1 else 'lines'} left out")
    kept = [line for line in lines if line["step"] <= step]
    # write_text replaces the file at once: if this process is killed or the disk is full, the old file stays.
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
