"""Measure the parts of a side: read the name of a part from stdin and write its seconds to stdout as a JSON line."""

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

_WARM_BATCHES = 8  # more than either side reads ahead, so that timed batches are also made in the timed interval
_LEAST_BATCHES = 8


class Side(ABC):
    """A trainer in parts. Every call works on one batch."""

    log_every: int
    parameters: int
    optimizer_seconds = 0.0  # spent in AdamW's own step, over all steps

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Return a new epoch of the loader: a generator that ends its workers when closed."""

    @abstractmethod
    def keep(self, batch: Any) -> None:
        """Cache the batch that ``network`` and ``step`` use."""

    @abstractmethod
    def network(self) -> None:
        """Run backbones and heads with prototypes on all views, and backward from a fixed gradient of the logits."""

    @abstractmethod
    def step(self, batch: Any = None, *, log: bool) -> None:
        """Run a whole training step on ``batch`` or the cached batch; with ``log`` the trainer writes its line."""

    def time_step(self, *, log: bool) -> tuple[float, float]:
        """Return the seconds of a step and of AdamW in it."""
        before = self.optimizer_seconds
        seconds = _seconds(lambda: self.step(log=log))
        return seconds, self.optimizer_seconds - before

    def watch(self, optimizer: Any) -> None:
        """Measure the time in the optimizer's own step."""
        inner = optimizer.step

        def step(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = inner(*arguments, **options)
            self.optimizer_seconds += time.perf_counter() - started
            return result

        optimizer.step = step


def serve(make: Callable[[], Side], seconds: float) -> None:
    """Answer until stdin ends. Output of libraries goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    side = make()
    with closing(side.batches()) as batches:
        side.keep(next(batches))
    for _ in range(2):  # warms up oneDNN's primitives, DeepSpeed's first step and the allocator
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
    """Return medians of network and step, which alternate. ``else`` is the median of step minus network in each pair.

    Steps that log count by their share.
    """
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
    """Return seconds per batch of the loader alone."""
    with closing(side.batches()) as batches:
        per_batch, _ = _drain(batches, lambda batch: None, budget)
    return {"data": per_batch}


def _end_to_end(side: Side, budget: float) -> dict[str, float]:
    """Return seconds per step with the loader, and the memory of the process and its workers."""
    count = iter(range(1, 2**31))
    with closing(side.batches()) as batches:
        consume = lambda batch: side.step(batch, log=next(count) % side.log_every == 0)  # noqa: E731
        per_batch, tree = _drain(batches, consume, budget)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"end_to_end": per_batch, "peak_rss_mib": peak, "tree_pss_mib": tree}


def _drain(batches: Iterator[Any], consume: Callable[[Any], None], budget: float) -> tuple[float, float]:
    """Return mean seconds per batch in steady state, and the memory of the process and its workers in MiB."""
    began = time.perf_counter()
    for _ in range(_WARM_BATCHES):
        consume(next(batches))
        if time.perf_counter() - began > 3 * budget:  # the network is so slow that the loader waits for it anyway
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
    """Return the memory of this process and its workers. Pages that a fork shares count once."""
    import psutil

    me = psutil.Process()
    return sum(process.memory_full_info().pss for process in (me, *me.children(recursive=True))) / 2**20


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
