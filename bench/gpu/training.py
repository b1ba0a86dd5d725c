"""Whole training runs on a GPU: images/s by the run's own record, and how much of a step waits for the data.

``fasttrain/run.py`` in a process of its own, on JPEGs drawn here at ImageNet's size and weight, with the recipes that
users take. A row is the median over what the run logged past its first steps, which compile and fill the queues.
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

_IMAGES, _COPIES = 512, 16  # drawn, and how often each is in the folder
_WARM = 30  # steps that do not count
_LONGEST = 150  # seconds a run
_OF_THIS_PROCESS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a run takes its share of the cores


@dataclass(frozen=True)
class Case:
    """A run: its name for the table and its flags."""

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
            found, fault = attempt(lambda case=case, output=output: train(case.flags, data, output))
            run.add({"case": str(case), "fault": fault, **(found or {})})


def draw(root: Path, files: list[bytes], copies: int) -> Path:
    """A folder tree of JPEGs, train/ and val/, with two classes."""
    for split, count in (("train", copies * len(files)), ("val", 16)):
        for kind in "ab":
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i:06d}.jpg"
            if i < len(files):
                path.write_bytes(files[i])
            else:  # no more bytes to write than there are
                path.hardlink_to(root / split / "ab"[i % len(files) % 2] / f"{i % len(files):06d}.jpg")
    return root


def train(
    flags: Sequence[str], data: Path, output: Path, *, steps: int = 70, every: int = 10, warm: int = _WARM
) -> dict[str, Any]:
    """Run, and read the record. Raises RuntimeError with the run's last line, or that it took too long."""
    command = [sys.executable, str(ROOT / "fasttrain/run.py"), *flags, "--data_path", str(data)]
    command += ["--output_dir", str(output), "--limit_steps", str(steps), "--log_every", str(every), "--knn_every", "0"]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THIS_PROCESS}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST, cwd=ROOT, env=environment)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {_LONGEST} s") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise RuntimeError(f"status {done.returncode}: {said[-1]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return figures(lines, warm) | {"peak_bytes": json.loads((output / "summary.json").read_text())["gpu_peak_bytes"]}


def figures(lines: list[dict[str, Any]], warm: int) -> dict[str, Any]:
    """Of a run's logged steps, those past its first ones."""
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
    """A line for each run that broke."""
    return [f"{row['case']}: {row['fault']}" for row in rows if row["fault"] not in (None, "OOM")]
