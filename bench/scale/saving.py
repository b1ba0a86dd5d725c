"""Measure how long the training of two ranks waits for a checkpoint of a ViT-B with its teacher, at ZeRO 0 and 3.

    python -m bench.scale.saving --json        # also write bench/results/checkpoints.json

*Written first*: the training waits until the checkpoint is written, flushed, read back and published, as it does when a
copy has no room. *Copied*: it waits for the copy in host memory only. Both are made in turn by the same engines over
gloo on one machine, and the slower rank counts. It takes about 4 minutes, 12 GB of memory and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench import RESULTS, ROOT
from bench.scale.environments import environments

_RESULT = RESULTS / "checkpoints.json"
_STAGES = (0, 3)
_RANKS = 2
Row = dict[str, Any]


def main() -> None:
    """Measure every stage in two new processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="a folder of the disk to measure")
    parser.add_argument("--json", action="store_true", help=f"also write {_RESULT.relative_to(ROOT)}")
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        print(json.dumps(measure(options.arch, options.stage, options.rounds, Path(options.folder))))
        return
    rows = [_in_processes(options.arch, stage, options.rounds, options.folder) for stage in _STAGES]
    print(table(rows))
    if options.json:
        _RESULT.write_text(json.dumps({"ranks": _RANKS, "rows": rows}, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """Return a table with a line per stage, in seconds per GB of the checkpoint."""
    head = (
        "checkpoint | GB | written first, s per GB | copied, s per GB | first copy, s per GB | copied / written first"
    )
    lines = [f"| {head} |", "|---|" + "---:|" * 5]
    for row in rows:
        size, written, copied = row["bytes"] / 1e9, median(row["written"]), median(row["copied"])
        seconds = [f"{value / size:.2f}" for value in (written, copied, row["first_copy"])]
        cells = [f"{row['arch']}, ZeRO {row['zero_stage']}", f"{size:.2f}", *seconds, f"{100 * copied / written:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _in_processes(arch: str, stage: int, rounds: int, folder: str) -> Row:
    with tempfile.TemporaryDirectory(dir=folder, prefix="fasttrain-saving-") as output:
        command = [sys.executable, "-W", "ignore", "-m", "bench.scale.saving", "--arch", arch, "--stage", str(stage)]
        command += ["--rounds", str(rounds), "--folder", output]
        ranks = [
            subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
            for variables in environments(_RANKS)
        ]
        texts = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise SystemExit(f"ZeRO {stage}: a rank failed")
    row: Row = json.loads(texts[0].splitlines()[-1])
    return row


def measure(arch: str, stage: int, rounds: int, folder: Path) -> Row:
    """Return the seconds that this stage's checkpoints stop the training, the most of all ranks. Runs on each rank."""
    from fasttrain.distributed.world import World, initialise, prepare_environment

    prepare_environment()
    import torch

    from fasttrain.checkpoint import store
    from fasttrain.checkpoint.card import Card, tag
    from fasttrain.config.resolve import resolve
    from fasttrain.distributed.world import all_gather_object
    from fasttrain.engine.build import build_method
    from fasttrain.engine.engine import Engine
    from fasttrain.pipelines import Batch

    world = World.from_environment()
    initialise(world)
    values = {
        "arch": arch,
        "batch_size_per_gpu": 2,
        "zero_stage": stage,
        "local_crops_number": 0,
        "global_crops_size": 64,
    }
    config = resolve("dino", {"recipe": "imagenet", **values})
    method = build_method(config, images=8, world_size=world.size)
    engine = Engine(config, method, world, steps_per_epoch=4)
    views = tuple(torch.randn(n, 2, 3, d, d) for d, n in config.views.groups)
    step = engine.step_at(0, measure=False)
    engine.micro_step(Batch(views, None, torch.arange(2)), step)  # after a step the optimizer has its moments
    engine.update(step)
    publishers = {
        name: store.Publisher(engine, folder, newest=1, note=lambda _: None) for name in ("copied", "written")
    }
    room, number = store.available_memory, 0
    seconds: dict[str, list[float]] = {name: [] for name in publishers}
    for _ in range(rounds + 1):
        for name, publisher in publishers.items():
            store.available_memory = room if name == "copied" else lambda: 0
            number += 1
            card = Card("dino", False, arch, "adamw", number, world.size, stage, "0")
            torch.distributed.barrier()
            started = time.perf_counter()
            publisher.publish(card, keep=False)
            waited = time.perf_counter() - started
            publisher.wait()
            seconds[name].append(max(all_gather_object(world, waited)))
    size = sum(file.stat().st_size for file in (folder / tag(number)).iterdir())
    return {
        "arch": arch,
        "zero_stage": stage,
        "bytes": size,
        "first_copy": seconds["copied"][0],
        "copied": seconds["copied"][1:],
        "written": seconds["written"][1:],
    }


if __name__ == "__main__":
    main()
