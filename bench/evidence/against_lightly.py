"""Compare trainings with lightly 1.6 on the same network, images, views, epochs and optimizer: k-NN and time.

    pip install -e '.[bench]'
    python -m bench.evidence.against_lightly --data_path CIFAR10         # folders train/ and test/

SimCLR, SwAV, DINO and BYOL use the cifar recipe. Lightly's side is its dataset, transforms, heads, losses and EMA in
the loop of its examples (``bench/trainer/sides/peer.py``), with our backbone, AdamW, schedules and k-NN. Each training
is a process of its own, and ours and lightly's alternate. Seconds are of the training loop, for the fastest seed. Ours
follows lightly where the two differ by design: weight decay on every parameter, constant momentum of BYOL and DINO, no
frozen prototypes.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evidence.campaign import EVIDENCE, Row, Run, knn_of, parser, run_all, table

_METHODS = ("simclr", "swav", "dino", "byol")
_EPOCHS = 5
_ALIKE = {
    "simclr": (),
    "swav": ("--freeze_prototypes_epochs", "0"),
    "dino": ("--freeze_last_layer", "0", "--momentum_teacher_end", "0.99"),
    "byol": ("--momentum_teacher_end", "0.99"),
}


def flags(method: str) -> tuple[str, ...]:
    """Return the flags of both sides."""
    shared = ("--recipe", "cifar", "--epochs", str(_EPOCHS), "--knn_every", "1000")
    return (*shared, "--decay_all", *_ALIKE[method])


class LightlyRun(Run):
    """The same training with lightly's classes. Its name ends with `` lightly``."""

    @property
    def command(self) -> list[str]:
        """Return the command of this module as lightly's side."""
        method = self.name.split()[0]
        side = [sys.executable, "-m", "bench.evidence.against_lightly", "--side", method]
        return [*side, "--seeds", str(self.seed), "--flags", *self.all_flags]


def design(methods: Sequence[str], seeds: list[int], data: str) -> list[Run]:
    """Return our runs and lightly's, alternating."""
    runs: list[Run] = []
    for seed in seeds:
        for method in methods:
            runs += [
                kind(name, seed, flags(method), data)
                for kind, name in ((Run, method), (LightlyRun, f"{method} lightly"))
            ]
    return runs


def lightly_side(method: str, seed: int, arguments: list[str]) -> dict[str, Any]:
    """Train with lightly's classes, and return the entries of summary.json that the table needs."""
    from fasttrain.distributed.world import World, initialise, prepare_environment

    prepare_environment()
    import torch

    from bench.trainer.sides.peer import Peer
    from fasttrain.config.arguments import parse
    from fasttrain.evaluate.evaluator import Evaluator
    from fasttrain.optim.schedules import warmup_cosine
    from fasttrain.pipelines import open_source

    config, _ = parse(["--method", method, "--seed", str(seed), *arguments])
    t, world = config.train, World.from_environment()
    initialise(world)
    side = Peer(config)
    peak = side.optimizer.param_groups[0]["lr"]
    steps = len(side.loader)
    total = t.epochs * steps
    started = time.perf_counter()
    for epoch in range(t.epochs):
        for index, batch in enumerate(side.batches()):
            done = epoch * steps + index
            for group in side.optimizer.param_groups:
                group["lr"] = warmup_cosine(done + 1, total, t.warmup_epochs * steps, peak, t.min_lr)
            side.step(batch, log=True)
    seconds = time.perf_counter() - started
    evaluator = Evaluator(open_source(t.data_path, t.val_path), config, torch.device("cpu"), world)
    scores = evaluator.backbone(side.model.backbone)
    evaluator.close()
    images = total * t.batch_size_per_gpu
    return {"knn_top1": scores.knn_top1, "rankme": scores.rankme, "seconds": seconds, "images_per_s": images / seconds}


def fastest(rows: list[Row], name: str) -> float:
    """Return the least seconds over the seeds of a run, because other load only adds to the time."""
    return min((float(row["seconds"]) for row in rows if row["run"] == name), default=math.nan)


def report(rows: list[Row], methods: Sequence[str] = _METHODS) -> str:
    """Return a table with a line per method: k-NN of both sides, seconds, and lightly's seconds divided by ours."""
    body = []
    for method in methods:
        cells = [knn_of(rows, name) for name in (method, f"{method} lightly")]
        seconds = [fastest(rows, name) for name in (method, f"{method} lightly")]
        body.append([method, *cells, *(f"{s:.0f}" for s in seconds), f"{seconds[1] / seconds[0]:.1f}"])
    return table(["method", "k-NN, ours (seeds)", "lightly", "seconds, ours", "lightly", "ratio"], body)


def main() -> None:
    """Train the missing runs and print the table."""
    flags_parser = parser(__doc__, seeds=(0, 1, 2))
    flags_parser.add_argument("--data_path", help="CIFAR-10 as folders train/ and test/")
    flags_parser.add_argument("--methods", nargs="+", default=_METHODS, choices=_METHODS)
    flags_parser.add_argument("--side", choices=_METHODS, help="train one run with lightly's classes")
    flags_parser.add_argument("--flags", nargs="...", default=[], help="the flags of that run")
    options = flags_parser.parse_args()
    if options.side:
        arguments = list(options.flags)
        output = Path(arguments[arguments.index("--output_dir") + 1])
        summary = lightly_side(options.side, options.seeds[0], arguments)
        (output / "summary.json").write_text(json.dumps(summary))
        return
    path = EVIDENCE / "against_lightly.json"
    runs = design(options.methods, options.seeds, options.data_path)
    print(report(run_all(runs, path, show=options.show), options.methods))


if __name__ == "__main__":
    main()
