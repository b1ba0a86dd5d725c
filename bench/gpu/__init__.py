"""Measure the kernels on a GPU: the run with its budget and report, rooflines, and calls that may fail.

A part is a function ``part(run)`` that adds rows. A family of kernels has its parts in a module here, and __main__.py
lists them. Rows are plain dictionaries, as in the report. Parts take their work from ``run.in_time``, so that one place
checks the budget. The ``str`` of an item is its name in the report.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Row = dict[str, Any]

_LONGEST = 120  # seconds for one task of a worker process; then the process is ended
_WRITE_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Part:
    """A part of the run."""

    name: str
    run: Callable[[Run], None]
    table: Callable[[list[Row]], str]
    until: float
    """The share of the budget after which the part starts no more work."""
    failures: Callable[[list[Row]], list[str]] | None = None
    """Return a line per failure of the run."""
    stops: Callable[[list[Row]], bool] | None = None
    """Return whether the run ends after this part, because the results are wrong. An error in the part ends it too."""


@dataclass
class Budget:
    """A number of seconds from the construction of this object on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def elapsed(self) -> float:
        return self.clock() - self._started

    def spent(self, share: float = 1.0) -> bool:
        """Return whether this share of the budget is used."""
        return self.elapsed() >= share * self.seconds


class Run:
    """One run: the machine, the report so far, and the remaining time."""

    def __init__(self, path: Path, about: dict[str, Any], budget: Budget, *, chip: Any = None, workers: int = 0):
        self.path, self.budget, self.chip, self.workers = path, budget, chip, workers
        self.content: dict[str, Any] = {"environment": about, "settings": {"budget_s": budget.seconds}, "parts": {}}
        self._part: dict[str, Any] = {"rows": [], "left_out": []}
        self._until, self._started, self._written = 1.0, 0.0, budget.elapsed()

    def start(self, part: Part) -> list[Row]:
        """Start a part, and return the list of its rows."""
        self._part = self.content["parts"][part.name] = {"rows": [], "left_out": []}
        self._until, self._started = part.until, self.budget.elapsed()
        rows: list[Row] = self._part["rows"]
        return rows

    def finish(self, error: str | None) -> list[str]:
        """End the part, write the report, and return the names of the items that were left out."""
        left_out: list[str] = self._part["left_out"]
        self._part |= {"error": error, "seconds": round(self.budget.elapsed() - self._started, 1)}
        self.write()
        return left_out

    def add(self, row: Row) -> None:
        self._part["rows"].append(row)
        if self.budget.elapsed() - self._written >= _WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Write the report atomically, so that an interrupted run leaves the last whole report."""
        self._written = self.budget.elapsed()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)

    def in_time(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items for which there is time, and record the names of the others."""
        for item in items:
            if self.budget.spent(self._until):
                self._part["left_out"].append(str(item))
            else:
                yield item

    def side_by_side(self, work: Callable[[Item], Any], items: Iterable[Item]) -> Iterator[tuple[Item, Any]]:
        """Yield every item for which there is time with the result of ``work``, computed in worker processes.

        Compilation takes most of the time, and the compiled kernels stay in Triton's cache on disk. Do not use this
        for timed work. Without workers this process does the work. Raise WorkerLost if a worker dies or hangs.
        """
        waiting = self.in_time(items)
        if not self.workers:
            yield from ((item, work(item)) for item in waiting)
            return
        with ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn")) as pool:
            running: dict[Future[Any], Item] = {}
            while True:
                for item in islice(waiting, self.workers - len(running)):
                    running[pool.submit(_with_alarm, work, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    try:
                        result = future.result()
                    except BrokenProcessPool as error:
                        names = "; ".join(map(str, running.values()))
                        raise WorkerLost(f"a worker died in one of: {names}") from error
                    yield running.pop(future), result


def _with_alarm(work: Callable[[Item], Any], item: Item) -> Any:
    signal.alarm(_LONGEST)  # a hanging kernel can only be ended with its process
    try:
        return work(item)
    finally:
        signal.alarm(0)


class WorkerLost(Exception):
    """Raised if a worker process ended before its work, by itself or after the time limit."""


class DeviceLost(Exception):
    """Raised if the GPU no longer responds in this process, for example after an invalid memory access."""


def attempt(call: Callable[[], Item]) -> tuple[Item | None, str | None]:
    """Return the result of a call, or its error: "OOM" or one line. Raise DeviceLost if the GPU no longer responds."""
    import torch

    fault = None
    try:
        return call(), None
    except torch.OutOfMemoryError:
        fault = "OOM"
    except Exception as error:
        fault = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    # Outside of the handler, because its traceback holds references to the tensors.
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(fault) from error
    return None, fault


def chip_of(capability: tuple[int, int], chips: Iterable[Any]) -> Any:
    """Return the data sheet of a GPU in bench/kernels/aot.py, or None for an unknown GPU."""
    return next((chip for chip in chips if chip.capability == 10 * capability[0] + capability[1]), None)


def roofline_seconds(chip: Any, scores: float, dim: int, dtype: str, *, products: float, exps: float) -> float | None:
    """Return the roofline in seconds for products and exponentials per score, or None for an unknown chip."""
    from bench.kernels import aot

    return None if chip is None else aot.roofline_seconds(chip, scores, dim, dtype, products=products, exps=exps)


def percent(part: float | None, whole: float | None) -> float | None:
    return None if not part or not whole else float(f"{100 * part / whole:.3g}")


def markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table. The first column is left-aligned, and None is an empty cell."""
    head = list(head)
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [["" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{1e3 * seconds:.4g}"


def worker_count() -> int:
    """Return the number of workers: two cores stay free, and at most 14, because each worker has a GPU context."""
    return max(1, min(14, len(os.sched_getaffinity(0)) - 2))
