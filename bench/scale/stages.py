"""50 steps at ZeRO 0 to 3 on two ranks beside ZeRO 0 on one rank, with the same global batch and views, in fp32.

    python -m bench.scale.stages

{SimCLR, SwAV, BYOL, DINO, MoCo v3} x {AdamW, LARS} on the embedded digits. Two ranks add in another order than one, and
training amplifies rounding, so beside every distance is the one that another order of sums alone makes: one rank with
two threads in place of one. Distances are of the loss, in nats, at the worst of the 50 steps, and of all weights of
student and teacher at the end, relative to how far those have come since the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import RESULTS, ROOT
from bench.scale.ends import State, ended

_RESULT = RESULTS / "stages.json"
_METHODS = ("simclr", "swav", "byol", "dino", "mocov3")
_OPTIMIZERS = {"adamw": ("--lr", "1e-3"), "lars": ("--lr", "1", "--weight_decay", "1e-6", "--weight_decay_end", "1e-6")}
_STEPS, _BATCH = 50, 32
_COMMON = ["--recipe", "demo", "--epochs", "10", "--warmup_epochs", "0", "--log_every", "1", "--knn_every", "0"]
_COMMON += ["--precision", "fp32", "--num_workers", "1"]
Run = tuple[list[float], State, State]


def train(method: str, optimizer: str, *, ranks: int = 1, threads: int = 1, stage: int = 0) -> Run:
    """The loss of every step, and all that a checkpoint holds after the first and after the last."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    flags = ["--method", method, "--optimizer", optimizer, *_OPTIMIZERS[optimizer], *_COMMON]
    flags += ["--batch_size_per_gpu", str(_BATCH // ranks), "--zero_stage", str(stage)]
    ends = []
    with tempfile.TemporaryDirectory() as output:
        for steps in (1, _STEPS):  # the second goes on from where the first ended
            command = [sys.executable, *launch, "fasttrain/run.py", *flags, "--output_dir", output]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            subprocess.run(
                [*command, "--limit_steps", str(steps)],
                check=True,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            ends.append(ended(Path(output)))
        lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], *ends


def distance(one: Run, other: Run) -> dict[str, float]:
    """How far the second run is from the first: losses, student, teacher."""
    found = {"loss": max(abs(a - b) for a, b in zip(one[0], other[0], strict=True))}
    for part in ("student.", "teacher."):
        names = [n for n in one[2] if n.startswith(part) and " " not in n and one[2][n].is_floating_point()]
        if names:
            before, end, there = (
                torch.cat([s[n].double().flatten() for n in names]) for s in (one[1], one[2], other[2])
            )
            found[part.rstrip(".")] = float((there - end).norm() / (end - before).norm())
    return found


def main() -> None:
    """Train what the results lack and print a row per method, optimizer and stage."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = json.loads(_RESULT.read_text())["rows"] if _RESULT.is_file() else []
    for method in _METHODS:
        for optimizer in _OPTIMIZERS:
            if any((row["method"], row["optimizer"]) == (method, optimizer) for row in rows):
                continue
            one = train(method, optimizer)
            found = {"another order of sums": distance(one, train(method, optimizer, threads=2))}
            for stage in range(4):
                found[f"ZeRO {stage}"] = distance(one, train(method, optimizer, ranks=2, stage=stage))
            rows.append({"method": method, "optimizer": optimizer, "distances": found})
            settings = {"steps": _STEPS, "global_batch": _BATCH, "arch": "conv_small", "precision": "fp32"}
            _RESULT.write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")
    for row in rows:
        for name, values in row["distances"].items():
            shown = "  ".join(f"{key} {value:.1e}" for key, value in values.items())
            print(f"{row['method']:8}{row['optimizer']:7}{name:24}{shown}")


if __name__ == "__main__":
    main()
