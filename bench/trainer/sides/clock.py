"""What both sides answer to: a part's name a line on stdin, its seconds a JSON line on stdout."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

_WARM_BATCHES = 8  # more than either side reads ahead, so that what is timed was also made in that time
_LEAST_BATCHES = 8


class Side(ABC):
    """A trainer taken apart. Every call works on one batch."""

    log_every: int
    parameters: int
    optimizer_seconds = 0.0  # spent inside AdamW's own step, over all steps so far

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """A fresh epoch of the loader, a generator that ends its workers when closed."""

    @abstractmethod
    def keep(self, batch: Any) -> None:
        """Let ``network`` and ``step`` use this batch from now on."""

    @abstractmethod
    def network(self) -> None:
        """Backbones and heads, prototypes included, through all views, and back from a fixed gradient of the logits."""

    @abstractmethod
    def step(self, batch: Any = None, *, log: bool) -> None:
        """A whole training step on ``batch`` or the kept one; ``log`` where the trainer writes its line."""

    def time_step(self, *, log: bool) -> tuple[float, float]:
        """Seconds of a step, and of AdamW inside it."""
        before = self.optimizer_seconds
        seconds = _seconds(lambda: self.step(log=log))
        return seconds, self.optimizer_seconds - before

    def watch(self, optimizer: Any) -> None:
        """Add up the time spent inside the optimizer's own step."""
        inner = optimizer.step

        def step(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = inner(*arguments, **options)
            self.optimizer_seconds += time.perf_counter() - started
            return result

        optimizer.step = step


def serve(make: Callable[[], Side], seconds: float) -> None:
    """Answer until stdin ends. Whatever a library prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side = make()
    with closing(side.batches()) as batches:
        side.keep(next(batches))
    for _ in range(2):  # oneDNN's primitives, DeepSpeed's first step, the allocator
        side.network()
        side.step(log=True)
    parts = {"compute": _compute, "data": _data, "end_to_end": _end_to_end}
    import torch

    print(json.dumps({"threads": torch.get_num_threads(), "parameters": side.parameters}), file=out)
    for line in sys.stdin:
        before = sum(os.times()[:4])
        figures = parts[line.strip()](side, seconds)
        print(json.dumps(figures | {"cpu_seconds": sum(os.times()[:4]) - before}), file=out)


def _compute(side: Side, budget: float) -> dict[str, float]:
    """Network and step in turn; medians, that of everything else over neighbours. Logged steps count by their share."""
    networks, steps, logged, adamw = [], [], [], []
    ends = time.perf_counter() + budget
    side.network()
    while not networks or time.perf_counter() < ends:
        networks.append(_seconds(side.network))
        spent, inside = side.time_step(log=False)
        steps.append(spent)
        adamw.append(inside)
        if len(steps) % 4 == 1:
            logged.append(side.time_step(log=True)[0])
    line = max(0.0, statistics.median(logged) - statistics.median(steps)) / side.log_every
    return {
        "network": statistics.median(networks),
        "step": statistics.median(steps) + line,
        "else": statistics.median(s - n for s, n in zip(steps, networks, strict=True)) + line,
        "adamw": statistics.median(adamw),
    }


def _data(side: Side, budget: float) -> dict[str, float]:
    """Seconds a batch of the loader alone."""
    with closing(side.batches()) as batches:
        per_batch, _ = _drain(batches, lambda batch: None, budget)
    return {"data": per_batch}


def _end_to_end(side: Side, budget: float) -> dict[str, float]:
    """Seconds a step with the loader; memory of the process and its workers."""
    count = iter(range(1, 2**31))
    with closing(side.batches()) as batches:
        consume = lambda batch: side.step(batch, log=next(count) % side.log_every == 0)  # noqa: E731
        per_batch, tree = _drain(batches, consume, budget)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"end_to_end": per_batch, "peak_rss_mib": peak, "tree_pss_mib": tree}


def _drain(batches: Iterator[Any], consume: Callable[[Any], None], budget: float) -> tuple[float, float]:
    """Mean seconds a batch in steady state, and the tree's memory at the end of it in MiB."""
    began = time.perf_counter()
    for _ in range(_WARM_BATCHES):
        consume(next(batches))
        if time.perf_counter() - began > 3 * budget:  # a network so slow that the loader waits for it anyway
            break
    slow = time.perf_counter() - began > 3 * budget
    started, count = time.perf_counter(), 0
    for batch in batches:
        consume(batch)
        count += 1
        elapsed = time.perf_counter() - started
        if elapsed > budget and (slow or count >= _LEAST_BATCHES):
            break
    return elapsed / count, _tree_mib()


def _tree_mib() -> float:
    """Proportional memory of this process and its workers: pages that a fork shares count once."""
    import psutil

    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in (me, *me.children(recursive=True))) / 2**20


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
