"""Compare a training on two ranks with ZeRO 2 and on one rank: the loss curves differ only by rounding.

    python -m bench.kernels.ranks --data_path DIR            # DIR: CIFAR-10 as JPEG folders, train/ and test/

Three runs of the cifar recipe have the same global batch and seed, and so the same views: one rank with all threads,
one rank with one thread, and two ranks with ZeRO 2 through the deepspeed launcher. One thread sums in another order,
which shows the effect of rounding alone. Training amplifies rounding from step to step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import RESULTS, ROOT


def curve(options: argparse.Namespace, *, ranks: int, threads: int, more: list[str]) -> tuple[list[float], float]:
    """Return the loss of every logged step, and the final k-NN accuracy."""
    launch = [sys.executable] if ranks == 1 else ["deepspeed", "--num_accelerators", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--method", options.method, "--entropy", "--recipe", "cifar", "--data_path", options.data_path]
        flags += ["--limit_steps", str(options.steps), "--knn_every", "1000", "--output_dir", folder]
        flags += ["--batch_size_per_gpu", str(options.batch // ranks), *more]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*launch, "fasttrain/run.py", *flags], check=True, cwd=ROOT, env=environment)
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines], json.loads(Path(folder, "summary.json").read_text())["knn_top1"]


def distance(a: list[float], b: list[float]) -> dict[str, float]:
    """Return the differences of two curves in nats: in the first five logged steps, over all steps, and in the last."""
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return {"first": max(gaps[:5]), "median": statistics.median(gaps), "max": max(gaps), "last": gaps[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--method", default="dino")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128, help="images per step over all ranks")
    parser.add_argument("--output", type=Path, default=RESULTS / "ranks.json")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    one, knn = curve(options, ranks=1, threads=cores, more=[])
    thread, knn_thread = curve(options, ranks=1, threads=1, more=[])
    two, knn_two = curve(options, ranks=2, threads=cores // 2, more=["--zero_stage", "2"])
    results = {
        "method": f"{options.method}+er",
        "steps": options.steps,
        "global_batch": options.batch,
        "loss_one_rank": one,
        "loss_one_thread": thread,
        "loss_two_ranks_zero2": two,
        "one_thread_to_one_rank": distance(thread, one),
        "two_ranks_to_one_rank": distance(two, one),
        "knn_top1": {"one_rank": knn, "one_thread": knn_thread, "two_ranks_zero2": knn_two},
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({k: v for k, v in results.items() if "loss" not in k}, indent=1))


if __name__ == "__main__":
    main()
