"""Run trainings one after another, each in a process of its own, and skip trainings that have a result."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from bench import RESULTS, ROOT

EVIDENCE = RESULTS / "evidence"
DOCS = ROOT / "docs"
_COLUMNS = ["knn_top1", "knn_top1_untrained", "knn_top1_pixels", "rankme", "entropy", "entropy_max", "reconstruction"]
_COLUMNS += ["information", "deficit", "collapsed", "dataset", "epochs", "steps", "seconds", "images_per_s"]
Row = dict[str, Any]
Key = tuple[str, int, tuple[str, ...]]


@dataclass(frozen=True)
class Run:
    """One training with its flags."""

    name: str
    """``simclr`` or ``simclr+er``, then after a space the variant."""
    seed: int
    flags: tuple[str, ...] = ()
    data: str | None = field(default=None, compare=False)
    """Folder of the images on this machine; None for the embedded digits."""

    @property
    def command(self) -> list[str]:
        """Return the command line without the output folder."""
        method, _, twin = self.name.split()[0].partition("+")
        flags = ["--method", method, "--seed", str(self.seed), *(["--entropy"] if twin else []), *self.all_flags]
        return [sys.executable, str(ROOT / "fasttrain/run.py"), *flags]

    @property
    def key(self) -> Key:
        """Return the key that identifies the run and its row."""
        return self.name, self.seed, self.flags

    @property
    def all_flags(self) -> tuple[str, ...]:
        """Return the flags with the folder of the images."""
        return self.flags if self.data is None else (*self.flags, "--data_path", self.data)


def run_all(runs: Sequence[Run], path: Path, *, show: bool = False) -> list[Row]:
    """Train the runs that ``path`` lacks, write it after each run, and return the rows of ``runs`` in it.

    With ``show`` nothing is trained. A row with other flags is replaced.
    """
    if not show:
        with alone():
            for number, run in enumerate(runs, 1):
                rows = {_key(row): row for row in read(path)}
                if run.key in rows:
                    continue
                print(f"[{number}/{len(runs)}] {run.name}, seed {run.seed}", flush=True)
                others = [row for key, row in rows.items() if key[:2] != run.key[:2]]
                write(path, [*others, _train(run)])
    keys = {run.key for run in runs}
    return [row for row in read(path) if _key(row) in keys]


def read(path: Path) -> list[Row]:
    """Return the rows of a result file, or none if the file is missing."""
    rows: list[Row] = json.loads(path.read_text())["runs"] if path.is_file() else []
    return rows


def write(path: Path, rows: list[Row]) -> None:
    """Replace a result file atomically, so that an interruption leaves the old or the new file."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"cores": os.cpu_count(), "runs": rows}, indent=1) + "\n")
    part.replace(path)


def summary(rows: Sequence[Row], name: str, key: str = "knn_top1") -> tuple[float, float, int]:
    """Return mean, half the range, and number of values of a figure over the seeds of a run."""
    values = [row[key] for row in rows if row["run"] == name]
    if not values:
        return float("nan"), float("nan"), 0
    return mean(values), (max(values) - min(values)) / 2, len(values)


def knn_of(rows: Sequence[Row], name: str) -> str:
    """Return k-NN of a run for a table: the mean, and with several seeds half the range and their number."""
    knn, spread, count = summary(rows, name)
    return f"{knn:.3f} +- {spread:.3f} ({count})" if count > 1 else f"{knn:.3f}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with numbers aligned to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def parser(description: str | None, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """Return a parser with the flags that all campaigns share."""
    flags_parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags_parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    flags_parser.add_argument("--show", action="store_true", help="print the results; train nothing")
    return flags_parser


def _train(run: Run) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        status = subprocess.run([*run.command, "--output_dir", folder], cwd=ROOT, check=False).returncode
        if status not in (0, 3):
            raise SystemExit(f"{' '.join(run.command)} ended with status {status}")
        path = Path(folder, "summary.json")
        # A run that diverged or collapsed is a result too.
        content = json.loads(path.read_text()) if path.is_file() else {}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest child process so far
    figures = {key: content.get(key) for key in _COLUMNS}
    row = {"run": run.name, "seed": run.seed, "flags": list(run.flags), "status": status}
    return row | figures | {"peak_bytes_at_most": peak}


def _key(row: Row) -> Key:
    return row["run"], row["seed"], tuple(row["flags"])


@contextmanager
def alone() -> Iterator[None]:
    """Hold a lock, because two trainings at once on a few cores are many times slower than one after the other."""
    with Path(tempfile.gettempdir(), "fasttrain-campaign.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("another campaign is training on this machine. Wait for its end, or use --show.") from None
        yield
