"""Trainings one after another, each the command in a process of its own; what is done already is not done again."""

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
_KEPT = ["knn_top1", "knn_top1_untrained", "knn_top1_pixels", "rankme", "entropy", "entropy_max", "reconstruction"]
_KEPT += ["information", "deficit", "collapsed", "dataset", "epochs", "steps", "seconds", "images_per_s"]
Row = dict[str, Any]
Key = tuple[str, int, tuple[str, ...]]


@dataclass(frozen=True)
class Run:
    """One training: what it shows, and the flags that make it."""

    name: str
    """``simclr`` or ``simclr+er``, and after a space what is particular."""
    seed: int
    flags: tuple[str, ...] = ()
    data: str | None = field(default=None, compare=False)
    """Where the images lie on this machine; without it, the embedded digits."""

    @property
    def command(self) -> list[str]:
        """The command line, without where it writes."""
        method, _, twin = self.name.split()[0].partition("+")
        flags = ["--method", method, "--seed", str(self.seed), *(["--entropy"] if twin else []), *self.all_flags]
        return [sys.executable, str(ROOT / "fasttrain/run.py"), *flags]

    @property
    def key(self) -> Key:
        """What tells it from other runs, and finds its row."""
        return self.name, self.seed, self.flags

    @property
    def all_flags(self) -> tuple[str, ...]:
        """The flags with the place of the images."""
        return self.flags if self.data is None else (*self.flags, "--data_path", self.data)


def run_all(runs: Sequence[Run], path: Path, *, show: bool = False) -> list[Row]:
    """Make the runs that ``path`` does not hold yet, writing it after each; returns the rows of all ``runs`` there.

    With ``show`` nothing is trained. A row that other flags made is replaced.
    """
    if not show:
        with alone():
            for number, run in enumerate(runs, 1):
                held = {_key(row): row for row in read(path)}
                if run.key in held:
                    continue
                print(f"[{number}/{len(runs)}] {run.name}, seed {run.seed}", flush=True)
                others = [row for key, row in held.items() if key[:2] != run.key[:2]]
                write(path, [*others, _train(run)])
    wanted = {run.key for run in runs}
    return [row for row in read(path) if _key(row) in wanted]


def read(path: Path) -> list[Row]:
    """The rows of a result file, none if it is not there."""
    rows: list[Row] = json.loads(path.read_text())["runs"] if path.is_file() else []
    return rows


def write(path: Path, rows: list[Row]) -> None:
    """Replace a result file in one step, so that an interruption leaves the old one or the new."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"cores": os.cpu_count(), "runs": rows}, indent=1) + "\n")
    part.replace(path)


def summary(rows: Sequence[Row], name: str, key: str = "knn_top1") -> tuple[float, float, int]:
    """Mean, half the range, and number of a figure over the seeds of one run."""
    values = [row[key] for row in rows if row["run"] == name]
    if not values:
        return float("nan"), float("nan"), 0
    return mean(values), (max(values) - min(values)) / 2, len(values)


def knn_of(rows: Sequence[Row], name: str) -> str:
    """k-NN of a run for a table: mean, half the range and number of its seeds, where there are several."""
    knn, spread, count = summary(rows, name)
    return f"{knn:.3f} +- {spread:.3f} ({count})" if count > 1 else f"{knn:.3f}"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def parser(description: str | None, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """The flags that all campaigns share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    made.add_argument("--show", action="store_true", help="print what is there; train nothing")
    return made


def _train(run: Run) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*run.command, "--output_dir", folder], cwd=ROOT, check=False)
        if done.returncode not in (0, 3):
            raise SystemExit(f"{' '.join(run.command)} ended with status {done.returncode}")
        path = Path(folder, "summary.json")
        # A run that diverged or collapsed is a result too.
        found = json.loads(path.read_text()) if path.is_file() else {}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest child so far
    kept = {key: found.get(key) for key in _KEPT}
    what = {"run": run.name, "seed": run.seed, "flags": list(run.flags), "status": done.returncode}
    return what | kept | {"peak_bytes_at_most": peak}


def _key(row: Row) -> Key:
    return row["run"], row["seed"], tuple(row["flags"])


@contextmanager
def alone() -> Iterator[None]:
    """Two trainings at once on a few cores are many times slower than one after the other."""
    with Path(tempfile.gettempdir(), "fasttrain-campaign.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit("another campaign is training on this machine; wait for it, or --show") from None
        yield
