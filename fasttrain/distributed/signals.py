"""Signals that ask a run to stop: it finishes the step under way, publishes a checkpoint and says how to go on."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from types import FrameType, TracebackType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""A scheduler's or launcher's end, Ctrl-C, and the warning of SLURM's ``--signal=USR1@seconds``."""
_APART = 1.0  # seconds; a launcher hands Ctrl-C on to ranks that had it from the terminal already


class Signals:
    """Notes :data:`ASKING` while it is entered; a second SIGINT, a second or more later, raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}
        self._before: dict[signal.Signals, object] = {}

    @property
    def counts(self) -> list[float]:
        """1 for each of :data:`ASKING` that has arrived, else 0; summed over ranks, what :func:`asked` reads."""
        return [float(number in self._first) for number in ASKING]

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self._first.setdefault(number, now) >= _APART:
            raise KeyboardInterrupt
        self._first.setdefault(number, now)

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def asked(counts: Sequence[float]) -> signal.Signals | None:
    """The signal that stops the run, from how often each of :data:`ASKING` arrived; None where none did."""
    return next((number for number, count in zip(ASKING, counts, strict=True) if count), None)
