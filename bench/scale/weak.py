"""Measure weak scaling on the two cores of one machine: one rank per core and 128 images per rank.

    python -m bench.scale.weak [--rounds 3] [--methods dino+er] [--stages 0] [--before CHECKOUT]

Nothing else may run on the machine. ``--before`` adds two ranks of an earlier checkout at ZeRO 0, in turn with the
others.

A step of two ranks takes longer for two reasons: cores share caches and memory, and ranks send and wait for each other.
Two independent runs of one rank at the same time ("strangers") have only the first reason. The runs are DINO's twin and
SimCLR on the embedded digits, conv_small, gloo over loopback. Sides alternate, each pinned to its core with one thread.
Efficiency is the seconds per step of one rank alone divided by the seconds of the side, from medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench import RESULTS, ROOT
from bench.scale.environments import environments

_RESULT = RESULTS / "weak.json"
_METHODS = {"dino+er": ["--method", "dino", "--entropy"], "simclr": ["--method", "simclr"]}
_BATCH, _STEPS, _LOGGED = 128, 100, 20
_FLAGS = ["--epochs", "30", "--knn_every", "0", "--precision", "fp32", "--num_workers", "1"]
_FLAGS += ["--batch_size_per_gpu", str(_BATCH), "--limit_steps", str(_STEPS), "--log_every", str(_LOGGED)]


def start(
    method: str, output: Path, core: int, *flags: str, rank: dict[str, str] | None = None, root: Path = ROOT
) -> subprocess.Popen:
    """Start the command of a checkout as one rank, pinned to a core."""
    command = ["taskset", "-c", str(core), sys.executable, "fasttrain/run.py", *_METHODS[method], *_FLAGS, *flags]
    return subprocess.Popen(
        [*command, "--output_dir", str(output)],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | (rank or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def seconds_a_step(runs: list[subprocess.Popen], outputs: list[Path], images: int) -> float:
    """Return the median seconds per step of ``images`` over the logged lines, without the first line."""
    ended = [run.wait() for run in runs]
    if any(ended):
        raise SystemExit(f"bench.scale.weak: a run of {outputs[0].name} failed with statuses {ended}")
    lines = [json.loads(line) for output in outputs for line in (output / "metrics.jsonl").read_text().splitlines()]
    return median(images / line["images_per_s"] for line in lines if line["step"] > _LOGGED)


def alone(method: str, folder: Path, count: int = 1) -> float:
    """Run ``count`` independent runs of one rank at the same time."""
    outputs = [folder / f"alone-{count}-{core}" for core in range(count)]
    runs = [start(method, output, core) for core, output in enumerate(outputs)]
    return seconds_a_step(runs, outputs, _BATCH)


def together(method: str, folder: Path, stage: int, root: Path = ROOT) -> float:
    """Run two ranks of one run."""
    output = folder / f"{root.name}-zero-{stage}"
    runs = [
        start(method, output, core, "--zero_stage", str(stage), rank=environment, root=root)
        for core, environment in enumerate(environments(2))
    ]
    return seconds_a_step(runs, [output], 2 * _BATCH)


def main() -> None:
    """Measure all sides in turn, and print seconds and efficiency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(_METHODS), default=list(_METHODS))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    options = parser.parse_args()
    results = {}
    for method in options.methods:
        taken: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                taken.setdefault("one rank", []).append(alone(method, folder))
                taken.setdefault("two strangers", []).append(alone(method, folder, 2))
                if options.before:
                    before = together(method, folder, 0, options.before.resolve())
                    taken.setdefault("two ranks before, ZeRO 0", []).append(before)
                for stage in options.stages:
                    taken.setdefault(f"two ranks, ZeRO {stage}", []).append(together(method, folder, stage))
        one = median(taken["one rank"])
        results[method] = {side: {"seconds": s, "efficiency": one / median(s)} for side, s in taken.items()}
        for side, row in results[method].items():
            print(f"{method:9}{side:20}{median(row['seconds']):.3f} s  {row['efficiency']:.0%}", flush=True)
    settings = {"batch_size_per_gpu": _BATCH, "steps": _STEPS, "threads_a_rank": 1, "arch": "conv_small"}
    _RESULT.write_text(json.dumps(settings | {"methods": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
