"""What a run leaves behind: metrics.jsonl, log.txt, TensorBoard events, summary.json."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from ..config.settings import Config
from ..distributed.world import World
from ..errors import ConfigError
from ..files import finite, write_text


def output_folder(config: Config, world: World) -> Path:
    """Where the run is written, the same for all ranks. Raises ConfigError where a file cannot be made there."""
    chosen = [config.train.output_dir or (_new_folder(config) if world.is_main else "")]
    if world.size > 1:
        dist.broadcast_object_list(chosen)
    path = Path(chosen[0])
    try:
        path.mkdir(parents=True, exist_ok=True)
        for folder in (path, path / "checkpoints"):
            if folder.is_dir():
                tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        what = "written to" if path.is_dir() else "made"
        raise ConfigError(f"--output_dir {path} cannot be {what}: {error.strerror}; choose another") from None
    return path


def _new_folder(config: Config) -> str:
    """Make a folder that says what runs and since when; a second run of the same second gets its own."""
    name = f"{config.method}{'-er' if config.entropy else ''}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in itertools.count(1):
        path = Path("runs", name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # all ranks meet it again, and say so
            pass
        break
    return str(path)


class Recorder:
    """Writes the files of one run; only rank 0 has one. Lines are flushed as they are written."""

    def __init__(self, folder: Path, *, resumed_at: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.past = _drop_after(folder / "metrics.jsonl", resumed_at)
        """The lines of metrics.jsonl that an earlier part of this run wrote."""
        _drop_after(folder / "log.txt", resumed_at)
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._log = (folder / "log.txt").open("a", buffering=1)
        self._board = SummaryWriter(str(folder), purge_step=resumed_at + 1)  # it hides that step too
        self._hook = threading.excepthook

    def step(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the numbers in TensorBoard."""
        self._metrics.write(json.dumps(finite(values)) + "\n")
        for name, value in values.items():
            if name not in ("step", "epoch") and value is not None:
                self._board.add_scalar(name, value, values["step"])

    def epoch(self, values: dict[str, Any]) -> None:
        """One line of log.txt, in DINO's form."""
        self._log.write(json.dumps(finite(values)) + "\n")

    def __enter__(self) -> Recorder:
        threading.excepthook = self._of_a_thread
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._metrics.close()
            self._log.close()
            self._board.close()
        finally:
            threading.excepthook = self._hook

    def _of_a_thread(self, unhandled: threading.ExceptHookArgs) -> None:
        """Print an error of another thread, but not of TensorBoard's: it is raised here again, at the next number."""
        if not type(unhandled.thread).__module__.startswith("tensorboard."):
            self._hook(unhandled)


def epoch_line(epoch: int, step: int, values: list[dict[str, Any]]) -> dict[str, Any]:
    """DINO's line of log.txt: means over the epoch's logged steps."""
    names = [k for k in (values[-1] if values else {}) if k not in ("step", "epoch", "entropy_max")]
    means = {
        f"train_{k}": math.fsum(v[k] for v in values) / len(values)
        for k in names
        if all(isinstance(v.get(k), float) for v in values)
    }
    return {**means, "epoch": epoch, "step": step}


def write_summary(folder: Path, values: dict[str, Any]) -> None:
    """summary.json."""
    write_text(folder / "summary.json", json.dumps(finite(values), indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary.json of a finished run, or None."""
    try:
        content = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines of steps that a resumed run makes again, and a last one that was cut; returns the others."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    kept = [line for line in lines if line.get("step", 0) <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))  # killed, or on a full disk: all stays
    return kept
