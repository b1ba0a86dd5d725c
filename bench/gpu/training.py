"""Measure whole training runs on a GPU: images/s from the run's log, and the share of a step that waits for data.

``fasttrain/run.py`` runs in a process of its own with users' recipes, on generated JPEGs of ImageNet's size in pixels
and bytes. A row is the median over the logged steps, without the first steps, which compile and fill the queues.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import ROOT

from . import Row, Run, attempt, markdown
from .views import jpegs

_IMAGES, _COPIES = 512, 16  # generated images, and copies of each in the folder
_WARM = 30  # first steps, which do not count
_LONGEST = 150  # seconds per run
_OF_THIS_PROCESS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a run chooses its own number of threads


@dataclass(frozen=True)
class Case:
    """A run with its name and flags."""

    name: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def _case(method: str, arch: str, batch: int, *more: str) -> Case:
    flags = ("--method", method, "--recipe", "imagenet", "--arch", arch, "--batch_size_per_gpu", str(batch), *more)
    return Case(f"{method}{' +ER' * ('--entropy' in more)}, {arch}, batch {batch}", flags)


CASES = (
    _case("dino", "vit_small", 256),
    _case("simclr", "resnet50", 256),
    _case("dino", "vit_small", 256, "--entropy"),
    _case("dino", "vit_base", 128),
)


def training(run: Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = draw(Path(folder) / "images", jpegs(_IMAGES, 375, 500), _COPIES)
        for case in run.in_time(CASES):
            output = Path(tempfile.mkdtemp(dir=folder))
            row, fault = attempt(lambda case=case, output=output: train(case.flags, data, output))
            run.add({"case": str(case), "fault": fault, **(row or {})})


def draw(root: Path, files: list[bytes], copies: int) -> Path:
    """Write JPEGs into train/ and val/ with two classes each."""
    for split, count in (("train", copies * len(files)), ("val", 16)):
        for kind in "ab":
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i:06d}.jpg"
            if i < len(files):
                path.write_bytes(files[i])
            else:  # a hard link needs no bytes
                path.hardlink_to(root / split / "ab"[i % len(files) % 2] / f"{i % len(files):06d}.jpg")
    return root


def train(
    flags: Sequence[str], data: Path, output: Path, *, steps: int = 70, every: int = 10, warm: int = _WARM
) -> dict[str, Any]:
    """Train, and return the figures of the log. Raise RuntimeError with the run's last line or after the time limit."""
    command = [sys.executable, str(ROOT / "fasttrain/run.py"), *flags, "--data_path", str(data)]
    command += ["--output_dir", str(output), "--limit_steps", str(steps), "--log_every", str(every), "--knn_every", "0"]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THIS_PROCESS}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST, cwd=ROOT, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not finished after {_LONGEST} s") from None
    if process.returncode:
        lines = (process.stderr.strip() or process.stdout.strip() or "no output").splitlines()
        raise RuntimeError(f"status {process.returncode}: {lines[-1]}")
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return figures(logged, warm) | {"peak_bytes": json.loads((output / "summary.json").read_text())["gpu_peak_bytes"]}


def figures(lines: list[dict[str, Any]], warm: int) -> dict[str, Any]:
    """Return figures of a run's logged steps after the first ``warm`` ones."""
    steady = [line for line in lines if line["step"] > warm]
    return {
        "steps": lines[-1]["step"],
        "images_per_s": round(statistics.median(line["images_per_s"] for line in steady), 1),
        "data_wait": round(statistics.median(line["data_wait"] for line in steady), 4),
        "loss": [round(lines[0]["loss"], 4), round(lines[-1]["loss"], 4)],
    }


def training_table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        if row["fault"]:
            body.append([row["case"], row["fault"], None, None, None])
            continue
        wait, peak = f"{100 * row['data_wait']:.1f} %", f"{row['peak_bytes'] / 2**30:.1f}"
        loss = " to ".join(map(str, row["loss"]))
        body.append([row["case"], row["images_per_s"], wait, peak, loss])
    return markdown(["training", "images/s", "waiting for data", "peak GiB", "loss"], body)


def training_failures(rows: list[Row]) -> list[str]:
    """Return a line per run that failed."""
    return [f"{row['case']}: {row['fault']}" for row in rows if row["fault"] not in (None, "OOM")]
