"""Signals that ask a run to stop. The run finishes the current step, publishes a checkpoint and ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""The end by a scheduler or launcher, Ctrl-C, the warnings of schedulers (SLURM's ``--signal``), a closed terminal."""
_REPEAT_SECONDS = 1.0  # a launcher forwards Ctrl-C to ranks that already received it from the terminal


class Stopped(BaseException):
    """A signal ended work between steps. It is not an Exception, so that the work itself cannot catch it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Signals:
    """A context that records :data:`STOPPING`. A second SIGINT, a second or more later, raises KeyboardInterrupt.

    Only the main thread can receive signals. In another thread the context changes nothing.
    """

    def __init__(self) -> None:
        self._arrivals: dict[int, float] = {}
        self._previous: dict[signal.Signals, object] = {}
        self._raises = False

    @property
    def counts(self) -> list[float]:
        """1 for each signal of :data:`STOPPING` that has arrived, else 0. :func:`stop_signal` takes sums over ranks."""
        return [float(number in self._arrivals) for number in STOPPING]

    @contextmanager
    def raising(self, ranks: int = 1) -> Iterator[None]:
        """Raise :class:`Stopped` as soon as a signal arrives, in the middle of the context's work.

        With several ranks it does nothing, because the other ranks would wait for this one.
        """
        if ranks == 1 and (number := stop_signal(self.counts)):
            raise Stopped(number)
        self._raises = ranks == 1
        try:
            yield
        finally:
            self._raises = False

    def _record(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self._arrivals.setdefault(number, now) >= _REPEAT_SECONDS:
            raise KeyboardInterrupt
        self._arrivals.setdefault(number, now)
        if self._raises:
            self._raises = False
            raise Stopped(signal.Signals(number))

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup: the run outlives its terminal
            handled = [number for number in STOPPING if not (number == signal.SIGHUP and ignored)]
            self._previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def stop_signal(counts: Sequence[float]) -> signal.Signals | None:
    """Return the signal that stops the run, from the count of each of :data:`STOPPING`, or None without any."""
    return next((number for number, count in zip(STOPPING, counts, strict=True) if count), None)
