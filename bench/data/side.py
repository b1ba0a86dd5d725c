"""Run one side of the loader's benchmark in a process of its own, for paired.py and test_data.py.

    python -m bench.data.side --who ours --case 0 --folder DIR --threads 2

A line on stdin is a number of seconds, or ``memory`` and a number of images. The answer is a JSON line on stdout.
Between questions the side reads ahead and waits. Those batches do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from bench import ROOT, measure

_AHEAD = 10  # batches; more than any side reads ahead
MIB = 2**20


class Side:
    """Control the process of a contestant. Raise NotRun if it cannot run."""

    def __init__(self, who: str, case: int, folder: Path, threads: int) -> None:
        command = [sys.executable, "-m", "bench.data.side", "--who", who, "--case", str(case), "--folder", str(folder)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = Popen([*command, "--threads", str(threads)], stdin=PIPE, stdout=PIPE, text=True, env=environment)
        self.about = self._answer()
        if "not_run" in self.about:
            from bench.peers import NotRun

            self.close()
            raise NotRun(self.about["not_run"])

    def ask(self, question: str) -> dict[str, Any]:
        """Return the result of ``speed`` or ``memory``."""
        assert self.process.stdin is not None
        print(question, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench.data.side: ended with status {self.process.wait()}. Its error is printed above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process and its workers."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def speed(batches: Iterator[int], seconds: float) -> dict[str, float]:
    """Measure the steady state for at least ``seconds``, from the arrival of one batch to the arrival of another.

    CPU seconds and memory are of the process and its workers. ``others_part`` is the share of the machine that other
    processes used.
    """
    for _ in range(_AHEAD):
        next(batches)
    started, computed, busy, images = time.perf_counter(), _cpu_seconds(), measure.busy_seconds(), 0
    while time.perf_counter() - started < seconds:
        images += next(batches)
    elapsed, cpu = time.perf_counter() - started, _cpu_seconds() - computed
    others = max(0.0, measure.busy_seconds() - busy - cpu) / elapsed / (os.cpu_count() or 1)
    figures = {"images": images, "seconds": elapsed, "cpu_seconds": cpu}
    return figures | {"memory_mib": _memory_mib(), "others_part": others}


def memory(batches: Iterator[int], images: int) -> dict[str, Any]:
    """Return the memory in MiB after every twentieth of the images."""
    sizes, done = [], 0
    while done < images:
        done += next(batches)
        if done * 20 >= images * (len(sizes) + 1):
            sizes.append(round(_memory_mib(), 1))
    return {"images": done, "memory_mib": sizes}


def _family() -> list[Any]:
    import psutil

    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def _memory_mib() -> float:
    """Return the memory of the process and its workers. Pages that a fork shares count once."""
    return float(sum(process.memory_full_info().pss for process in _family()) / MIB)


def _cpu_seconds() -> float:
    return float(sum(sum(process.cpu_times()[:2]) for process in _family()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--who", required=True)
    parser.add_argument("--case", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of libraries goes to stderr
    import torch

    from bench.peers import NotRun, loaders

    torch.set_num_threads(1)  # as in a worker process
    case = loaders.CASES[options.case]
    try:
        batches = loaders.CONTESTANTS[options.who](case, options.folder, options.threads)
        next(batches)
    except (NotRun, ModuleNotFoundError) as reason:
        print(json.dumps({"not_run": str(reason)}), file=out)
        return
    print(json.dumps({"who": options.who, "threads": options.threads}), file=out)
    for line in sys.stdin:
        question, _, number = line.strip().rpartition(" ")
        answer = memory(batches, int(number)) if question == "memory" else speed(batches, float(number))
        print(json.dumps(answer), file=out)
    os._exit(0)  # ends the workers too; waiting for them would take seconds


if __name__ == "__main__":
    main()
