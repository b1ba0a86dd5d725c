"""Compare 50 fp32 steps at ZeRO 0 to 3 on two ranks with ZeRO 0 on one rank, with the same global batch and views.

    python -m bench.scale.stages        # resumes an interrupted measurement

{SimCLR, SwAV, BYOL, DINO, MoCo v3} x {AdamW, LARS} on the embedded digits. Two ranks add in another order than one, and
training amplifies rounding. One rank with two threads instead of one shows the distance that another order of sums
makes alone. The distance of the loss is in nats, at the worst of the 50 steps. The distance of the final weights of
student and teacher is relative to the distance they moved since the first step.
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
    """Return the loss of every step, and the checkpoint after the first and after the last step."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    flags = ["--method", method, "--optimizer", optimizer, *_OPTIMIZERS[optimizer], *_COMMON]
    flags += ["--batch_size_per_gpu", str(_BATCH // ranks), "--zero_stage", str(stage)]
    ends = []
    with tempfile.TemporaryDirectory() as output:
        for steps in (1, _STEPS):  # the second run resumes the first
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
    """Return the distances of the second run from the first: losses, student, teacher."""
    distances = {"loss": max(abs(a - b) for a, b in zip(one[0], other[0], strict=True))}
    for part in ("student.", "teacher."):
        names = [n for n in one[2] if n.startswith(part) and " " not in n and one[2][n].is_floating_point()]
        if names:
            before, end, other_end = (
                torch.cat([s[n].double().flatten() for n in names]) for s in (one[1], one[2], other[2])
            )
            distances[part.rstrip(".")] = float((other_end - end).norm() / (end - before).norm())
    return distances


def main() -> None:
    """Train what the results lack and print a row per method, optimizer and stage."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = json.loads(_RESULT.read_text())["rows"] if _RESULT.is_file() else []
    for method in _METHODS:
        for optimizer in _OPTIMIZERS:
            if any((row["method"], row["optimizer"]) == (method, optimizer) for row in rows):
                continue
            one = train(method, optimizer)
            distances = {"another order of sums": distance(one, train(method, optimizer, threads=2))}
            for stage in range(4):
                distances[f"ZeRO {stage}"] = distance(one, train(method, optimizer, ranks=2, stage=stage))
            rows.append({"method": method, "optimizer": optimizer, "distances": distances})
            settings = {"steps": _STEPS, "global_batch": _BATCH, "arch": "conv_small", "precision": "fp32"}
            _RESULT.write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")
    for row in rows:
        for name, values in row["distances"].items():
            shown = "  ".join(f"{key} {value:.1e}" for key, value in values.items())
            print(f"{row['method']:8}{row['optimizer']:7}{name:24}{shown}")


if __name__ == "__main__":
    main()
