"""Signals that ask a run to stop. The run finishes the current step, publishes a checkpoint and ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""The end by a scheduler or launcher, Ctrl-C, and the warning of SLURM's ``--signal=USR1@seconds``."""
_REPEAT_SECONDS = 1.0  # a launcher forwards Ctrl-C to ranks that already received it from the terminal


class Signals:
    """A context that records :data:`STOPPING`. A second SIGINT, a second or more later, raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._arrivals: dict[int, float] = {}
        self._previous: dict[signal.Signals, object] = {}

    @property
    def counts(self) -> list[float]:
        """1 for each signal of :data:`STOPPING` that has arrived, else 0. :func:`stop_signal` takes sums over ranks."""
        return [float(number in self._arrivals) for number in STOPPING]

    def _record(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self._arrivals.setdefault(number, now) >= _REPEAT_SECONDS:
            raise KeyboardInterrupt
        self._arrivals.setdefault(number, now)

    def __enter__(self) -> Signals:
        self._previous = {number: signal.signal(number, self._record) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def stop_signal(counts: Sequence[float]) -> signal.Signals | None:
    """Return the signal that stops the run, from the count of each of :data:`STOPPING`, or None without any."""
    return next((number for number, count in zip(STOPPING, counts, strict=True) if count), None)
