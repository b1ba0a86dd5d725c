"""The demo of every method and its twin on the embedded digits, one run after another.

    python bench/demo.py --seeds 0 1 2 --methods dino+er         python bench/demo.py --output bench/results/demo.json

Each run is the README's command in a process of its own, with the peak memory of that process beside its summary.
Results are added to the file as they come; a run that is in it already is not made again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALL = ["dino+er", "dino", "dino-uncentred", "simclr", "simclr+er", "swav", "swav+er"]
KEPT = ["knn_top1", "knn_top1_untrained", "knn_top1_pixels", "rankme", "entropy", "entropy_max", "reconstruction"]
KEPT += ["information", "collapsed", "epochs", "seconds", "images_per_s"]


def run(name: str, seed: int) -> dict[str, object]:
    method, twin = name.partition("+")[0].partition("-")[0], name.endswith("+er")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "fasttrain/run.py", "--method", method, "--seed", str(seed), "--output_dir", folder]
        command += ["--entropy"] if twin else []
        command += ["--no_centering"] if name.endswith("-uncentred") else []  # as its twin has it
        subprocess.run(command, check=True, cwd=ROOT)
        summary = json.loads(Path(folder, "summary.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # the largest child so far
    return {"run": name, "seed": seed, **{k: summary[k] for k in KEPT}, "peak_bytes_at_most": peak}


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| run | seed | k-NN | untrained | pixels | entropy | reconstruction | information | seconds |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for r in rows:
        figures = [f"{r[k]:.3f}" for k in ("knn_top1", "knn_top1_untrained", "knn_top1_pixels")]
        figures += [f"{r[k]:.2f}" for k in ("entropy", "reconstruction", "information")]
        lines.append(f"| {r['run']} | {r['seed']} | {' | '.join(figures)} | {r['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=ALL, choices=ALL)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/demo.json")
    options = parser.parse_args()
    rows = json.loads(options.output.read_text())["runs"] if options.output.is_file() else []
    for seed in options.seeds:
        for name in options.methods:
            if any((r["run"], r["seed"]) == (name, seed) for r in rows):
                continue
            rows.append(run(name, seed))
            options.output.parent.mkdir(exist_ok=True)
            options.output.write_text(json.dumps({"cores": os.cpu_count(), "runs": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
