"""Compare our training step with lightly 1.6's: same method, network, batch, crops, images and two cores.

    pip install -e '.[bench]'
    python -m bench.trainer.paired --data_path DIR          # DIR: class folders of small images, as CIFAR-10's train/

Each side is a process of its own. One side works while the other is stopped (SIGSTOP). They alternate part by part and
round by round, so both times of a ratio are neighbours in time. Both sides use ``create_backbone`` with the cifar
recipe, fp32, AdamW, and gradient clipping where the recipe has it. Ours is Loader and Engine (DeepSpeed, ZeRO 0) in the
loop of ``fasttrain train``. The peer is lightly's dataset, transforms, heads, loss and EMA in the loop of its PyTorch
examples, with a DataLoader of two workers. The parts:

- data        the loader alone, in steady state
- network     backbones and heads on all views (DINO: also the teacher's), and backward from a fixed gradient. The
              product with the prototypes counts here on both sides, because lightly's heads contain it
- everything  a whole step on a fixed batch minus its network: loss, EMA, schedules, logging, clipping and optimizer,
  else        as a part of the step. ``adamw`` is torch's own step in it, ``glue`` is the rest
- end to end  steps with the loader

A ratio is lightly's seconds divided by ours (above 1: ours is faster): the median over the rounds, and their range. A
part runs for ``--seconds`` per round and side, and its time is the median over its calls. Peak RSS is of the main
process. PSS is of the main process and its workers, and counts shared pages once. A measurement waits for a quiet
machine (``--patience``) and repeats if other processes used more than 4 % of it. If at least three rounds were quiet,
the others are left out. The table shows the number of rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.measure import busy_seconds, processor

_QUIET = 0.04  # share of the machine that other processes may use during a measurement
_TRIES = 5
_FEWEST = 3  # quiet rounds; with fewer, all rounds count
_PARTS = ("compute", "data", "end_to_end")
_SIDES = ("ours", "lightly")
_PR_SET_PDEATHSIG = 1
_PACKAGES = ("torch", "timm", "deepspeed", "nvidia-dali-cuda130", "lightly", "torchvision", "pillow")
_patience = 0.0  # remaining seconds to wait for other processes
Round = dict[str, dict[str, float]]  # side, then figure


class Worker:
    """Run one side in a process with its workers. The process is stopped between two questions."""

    def __init__(self, side: str, method: str, arch: str, options: argparse.Namespace) -> None:
        command = [sys.executable, "-m", "bench.trainer.paired", "--serve", side, "--methods", method, "--arch", arch]
        command += ["--data_path", options.data_path, "--batch", str(options.batch), "--seconds", str(options.seconds)]
        # Our side sets the rest of its environment itself, as its command does.
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True
        )
        self.about = self._answer()

    def ask(self, part: str) -> dict[str, float]:
        """Return the figures of a part. Repeat it a few times if other processes used the cores."""
        best: dict[str, float] = {}
        for _ in range(_TRIES):
            _wait_for_quiet()
            started, busy = time.perf_counter(), busy_seconds()
            os.killpg(self.process.pid, signal.SIGCONT)
            print(part, file=self.process.stdin, flush=True)
            answer = self._answer()
            others = busy_seconds() - busy - answer.pop("cpu_seconds")
            answer["others_part"] = max(0.0, others / (time.perf_counter() - started) / (os.cpu_count() or 1))
            best = min(best or answer, answer, key=lambda one: one["others_part"])
            if best["others_part"] < _QUIET or _patience <= 0:
                break
        return best

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise SystemExit(f"bench.trainer.paired: a side ended with status {status}. Its error is printed above.")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return json.loads(line)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _wait_for_quiet() -> None:
    """Wait until the machine is idle for a second while both sides are stopped, or until patience has run out."""
    global _patience
    while _patience > 0:
        started, busy = time.perf_counter(), busy_seconds()
        time.sleep(1)
        elapsed = time.perf_counter() - started
        if (busy_seconds() - busy) / elapsed / (os.cpu_count() or 1) < _QUIET:
            return
        _patience -= elapsed


def main() -> None:
    options = _options()
    if options.serve:
        return _serve(options)
    global _patience
    _patience = options.patience
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(_title(options), flush=True)
    results = {}
    for arch in options.arch:
        for method in options.methods:
            results[f"{method}/{arch}"] = result = _compare(method, arch, options)
            print(_table(f"{method}, {arch}, batch {options.batch}", result), flush=True)
            _write(options, results)
    return None


def _compare(method: str, arch: str, options: argparse.Namespace) -> dict[str, Any]:
    workers: dict[str, Worker] = {}
    try:
        for side in _SIDES:
            workers[side] = Worker(side, method, arch, options)
        rounds = [_round(workers, number) for number in range(options.rounds)]
        quiet = [r for r in rounds if max(r[side]["others_part"] for side in _SIDES) < _QUIET]
        used = quiet if len(quiet) >= _FEWEST else rounds
        about = {side: worker.about for side, worker in workers.items()}
        return {"about": about, "rounds": len(used), "quiet_rounds": len(quiet), **_summary(used, options.batch)}
    finally:
        for worker in workers.values():
            worker.close()


def _round(workers: dict[str, Worker], number: int) -> Round:
    """Measure every part once on each side. The first side alternates."""
    figures: Round = {side: {} for side in _SIDES}
    for part in _PARTS:
        for side in _SIDES[:: 1 if number % 2 == 0 else -1]:
            answer = workers[side].ask(part)
            answer["others_part"] = max(answer["others_part"], figures[side].get("others_part", 0.0))
            figures[side] |= answer
    for own in figures.values():
        own["else_part"] = own["else"] / own["step"]
        own["glue_part"] = (own["else"] - own["adamw"]) / own["step"]
    return figures


def _summary(rounds: list[Round], batch: int) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in rounds[0]["ours"]:
        by_side = {side: [figures[side][name] for figures in rounds] for side in _SIDES}
        entry: dict[str, Any] = {side: _spread(values) for side, values in by_side.items()}
        if not name.endswith(("_part", "_mib")):
            pairs = zip(by_side["lightly"], by_side["ours"], strict=True)
            entry["ratio"] = _spread([theirs / ours for theirs, ours in pairs])
            for side in _SIDES:
                entry[side]["images_per_s"] = round(batch / entry[side]["median"], 1)
        summary[name] = entry
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {k: float(f"{f(values):.4g}") for k, f in (("min", min), ("median", statistics.median), ("max", max))}


def _table(title: str, result: dict[str, Any]) -> str:
    title += f", {result['rounds']} rounds, {result['quiet_rounds']} of them on a quiet machine"
    lines = [f"\n{title}", f"  {'':12} {'ours':>18} {'lightly':>18}   ratio (range)"]
    for name in ("data", "network", "step", "else", "adamw", "end_to_end"):
        row = result[name]
        cells = [f"{row[s]['images_per_s']:8.0f}/s {1e3 * row[s]['median']:7.1f}ms" for s in _SIDES]
        ratio = row["ratio"]
        lines.append(
            f"  {name:12} {cells[0]:>18} {cells[1]:>18}   {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    for name, label in (("else_part", "else / step"), ("glue_part", "glue / step"), ("others_part", "others' CPU")):
        cells = [f"{100 * result[name][s]['median']:.1f}% (min {100 * result[name][s]['min']:.1f}%)" for s in _SIDES]
        lines.append(f"  {label:12} {cells[0]:>20} {cells[1]:>20}")
    for name, label in (("peak_rss_mib", "peak RSS"), ("tree_pss_mib", "PSS")):
        cells = [f"{result[name][s]['max']:.0f} MiB" for s in _SIDES]
        lines.append(f"  {label:12} {cells[0]:>20} {cells[1]:>20}")
    return "\n".join(lines)


def _title(options: argparse.Namespace) -> str:
    machine = _machine()
    load = os.getloadavg()[0]
    packages = ", ".join(f"{name} {machine[name]}" for name in _PACKAGES)
    return f"{machine['processor']}, {machine['cores']} cores, 2 threads a side, load {load:.2f} before; {packages}"


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    settings = {"batch": options.batch, "rounds": options.rounds, "seconds": options.seconds, "threads": 2}
    settings |= {"loader_workers": 2, "recipe": "cifar", "precision": "fp32", "optimizer": "adamw"}
    path = options.output
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": _machine(), "settings": settings, "unit": "seconds per batch", "results": results}
    before = json.loads(path.read_text()) if path.is_file() else {}
    if all(before.get(key) == content[key] for key in ("machine", "settings")):
        content["results"] = before["results"] | results
    path.write_text(json.dumps(content, indent=1) + "\n")


def _serve(options: argparse.Namespace) -> None:
    """Run one side until stdin ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process would survive its killed parent
    from bench.trainer.sides.clock import serve
    from fasttrain.distributed.world import prepare_environment

    if options.serve == "ours":
        prepare_environment()
    from fasttrain.config.resolve import resolve

    values = {"recipe": "cifar", "arch": options.arch[0], "batch_size_per_gpu": options.batch}
    values |= {"data_path": options.data_path, "precision": "fp32", "zero_stage": 0, "optimizer": "adamw"}
    config = resolve(options.methods[0], values)

    def make() -> Any:
        if options.serve == "ours":
            from bench.trainer.sides.ours import Ours as Selected
        else:
            from bench.trainer.sides.peer import Peer as Selected
        return Selected(config)

    serve(make, options.seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data_path", required=True, help="class folders of images")
    parser.add_argument("--methods", nargs="+", default=["simclr", "swav", "dino"], choices=["simclr", "swav", "dino"])
    parser.add_argument("--arch", nargs="+", default=["conv_small", "resnet18"], help="as fasttrain's --arch")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of measurements")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per part, round and side")
    parser.add_argument("--patience", type=float, default=600, help="total seconds to wait for a quiet machine")
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "trainer-cpu.json",
        help="the JSON file; results of other methods with the same settings stay in it",
    )
    parser.add_argument("--serve", choices=_SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
