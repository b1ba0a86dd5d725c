"""End all ranks within seconds, with a reason, if one rank fails or a step hangs. Collectives would wait forever.

``faulthandler`` ends a rank that hangs. Its timer needs no Python code, so it fires while a C call holds the GIL. The
threads of this module do need the GIL: one reports a hang in one line, the other listens for the end of other ranks.
"""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import Crashed, printable
from .world import World

_KEY = "fasttrain/end"  # in the process group's store: "<status> <crash or hang> <rank>" of the first rank that ends
_PERIOD = 0.5  # seconds between looks at the store, and between settings of faulthandler's timer
_PATIENCE = 5.0  # seconds to wait for an answer of the store, whose machine may be unreachable
_LINGER = 4 * _PERIOD  # seconds that a rank stays after its report, because the store may end with it
_GRACE = _PATIENCE + _LINGER + _PERIOD  # seconds from the deadline to faulthandler's end; the report may take as long
_GRACE_ALONE = (
    86_400.0  # the same for a single rank, which Ctrl-Z may stop for hours: faulthandler's timer does not stop
)
_BUSY = 2e-4  # seconds of a thread's time per period from which on it works; a thread that waits uses less
CRASHED = 1  # exit status


def first_to_end(world: World, status: int = CRASHED, kind: str = "crash", *, store: Any = None) -> bool:
    """Return whether this rank is the first to end. The first rank prints the reason; the others end silently.

    The watchdogs of all other ranks end their processes with ``status``. A watchdog thread needs its own connection to
    the ``store``, opened while the rank that holds the store was alive. The main thread may block the process group's
    connection, and a new connection would be retried for half an hour.
    """
    if world.size == 1 or not dist.is_initialized():
        return world.is_main
    end = f"{status} {kind} {world.rank}"
    first: list[bool] = []

    def ask() -> None:
        try:
            first.append(bool((store or _get_default_store()).compare_set(_KEY, "", end).decode() == end))
        except RuntimeError:  # the store ended with the rank that held it
            first.append(True)

    # TCP waits much longer than _PATIENCE if the link to the store's machine is cut.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return first[0] if first else True


def linger(world: World) -> None:
    """Wait until the other ranks have seen that this rank ends."""
    if world.size > 1 and dist.is_initialized():
        time.sleep(_LINGER)


@contextmanager
def starting(world: World, minutes: float, *, leave: Callable[[int], None] = os._exit) -> Iterator[None]:
    """End the process if the context, the start of the process group, takes longer than ``minutes`` (0: no limit).

    Every rank prints a line, because ranks cannot agree on one speaker before all have started. If a C call holds the
    GIL, faulthandler ends the process instead and prints the stacks of all threads.
    """

    def end() -> None:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        _report(
            f"rank {world.rank} waited {minutes:g} minutes (--watchdog_minutes) at {where} for all "
            f"{world.size} ranks to start; see the other ranks' output, then start all of them again"
        )
        leave(CRASHED)

    limited = world.size > 1 and minutes > 0
    timer = threading.Timer(minutes * 60, end)
    timer.daemon = True
    if limited:
        timer.start()
        faulthandler.dump_traceback_later(minutes * 60 + _GRACE, exit=True, file=2)
    try:
        yield
    finally:
        if limited:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()


class Watchdog:
    """A context that watches the training of one rank.

    If no step finishes for ``minutes`` (0: no limit), a line on stderr reports it. Within ``_GRACE`` seconds the stacks
    of all threads are written to ``rank-N.log`` and the process ends with status 1. Only the line is missing if a C
    call holds the GIL; a single rank then ends after a day. If another rank has ended, the process ends with that
    rank's status. ``leave`` ends the process without the clean-up that waits for other ranks.

    The time in which a process is stopped (SIGSTOP, Ctrl-Z) does not count. The start of a run, from :meth:`begin` to
    the first :meth:`step_done`, may take any time in which the thread that made the watchdog does something.

    A process has one timer of faulthandler, so another use of ``faulthandler.dump_traceback_later`` replaces this one.
    """

    def __init__(self, world: World, minutes: float, *, leave: Callable[[int], None] = os._exit) -> None:
        self.world, self.limit, self.leave = world, minutes * 60, leave
        self.folder: Path | None = None
        """The run's folder, when it is known."""
        self._log: IO[bytes] | None = None
        self._now = 0.0  # seconds in which this process was not stopped
        self._deadline: float | None = None  # by that clock
        self._cpu_time: Callable[[], float] | None = None  # of the watched thread, during the start of the run
        self._set_at = -math.inf  # when faulthandler's timer was set
        self._ending = False
        """Whether the end of the process is certain. The timer is then not set again."""
        self._arming = threading.RLock()  # guards the fields above, the log and faulthandler's timer
        self._store = _get_default_store().clone() if world.size > 1 else None
        self._end: str | None = None
        """The end of the first rank that ended, as :data:`_KEY` has it."""
        self._stopped = threading.Event()
        self._reporting = threading.Lock()  # taken once, by the thread that reports the end of this process
        self._reporter = threading.Thread(target=self._watch, name="fasttrain-watchdog", daemon=True)
        # A thread of its own, because the store may never answer.
        self._listener = threading.Thread(target=self._listen, name="fasttrain-listener", daemon=True)

    def begin(self) -> None:
        """Watch the start of the run. Only rank 0 is watched: the others may wait for it as long as it works."""
        if self.world.is_main and hasattr(time, "pthread_getcpuclockid"):  # not on macOS
            clock = time.pthread_getcpuclockid(threading.get_ident())
            self._cpu_time = lambda: time.clock_gettime(clock)
            self._extend()

    def step_done(self) -> None:
        """Start the time limit again: a step or a batch of an evaluation has finished, or the first one begins."""
        self._cpu_time = None
        self._extend()

    def _extend(self) -> None:
        with self._arming:
            now = time.monotonic()
            if self.limit and not self._ending:
                self._deadline = self._now + self.limit
                if now - self._set_at >= _PERIOD:  # each setting starts a thread: 0.4 ms
                    self._set_at = now
                    grace = _GRACE if self.world.size > 1 else _GRACE_ALONE
                    faulthandler.dump_traceback_later(self.limit + grace, exit=True, file=self._open_log())

    def crashed(self, error: BaseException) -> Crashed:
        """Report in one line which rank failed and why, and write the traceback to ``rank-N.log``.

        A single rank returns the line in an exception, to be raised. With several ranks the process ends here.
        """
        first = str(error).strip().partition("\n")[0]
        line = f"rank {self.world.rank} failed: {type(error).__name__}{': ' if first else ''}{first}"
        if self.world.size == 1 or (self._reporting.acquire(blocking=False) and first_to_end(self.world)):
            text = "".join(traceback.format_exception(error))
            line = f"{line}; its traceback is {self._write_log('traceback', text) or 'above'}"
            if self.world.size > 1:
                _report(line)
        if self.world.size > 1:
            linger(self.world)
            self._leave(CRASHED)
        return Crashed(line)

    def _watch(self) -> None:
        looked, used = time.monotonic(), 0.0
        while not self._stopped.wait(_PERIOD):
            before, looked = looked, time.monotonic()
            self._now += min(looked - before, 2 * _PERIOD)  # more than this has passed if the process was stopped
            if cpu_time := self._cpu_time:
                used_before, used = used, cpu_time()
                if used - used_before > _BUSY:
                    self._extend()
            if self._end is not None:
                status, kind, _ = self._end.split()
                if kind == "hang":
                    faulthandler.dump_traceback(self._open_log())
                return self._leave(int(status))
            with self._arming:
                hung = self._deadline is not None and self._now > self._deadline
                self._ending |= hung
            if hung:
                return self._report_hang()

    def _report_hang(self) -> None:
        """Print the reason, unless another rank does. faulthandler ends the process afterwards."""
        if self._reporting.acquire(blocking=False) and first_to_end(self.world, CRASHED, "hang", store=self._store):
            rank, minutes = self.world.rank, self.limit / 60
            what = "finished no step" if self._cpu_time is None else "did nothing at its start"
            where = self._write_log(f"{what}, stacks of all threads") or "below"
            _report(
                f"rank {rank} {what} for {minutes:g} minutes (--watchdog_minutes); "
                f"the stacks of all threads are {where}"
            )
        faulthandler.dump_traceback_later(_LINGER, exit=True, file=self._open_log())

    def _listen(self) -> None:
        while self._store is not None and self._end is None and not self._stopped.wait(_PERIOD):
            try:
                if self._store.check([_KEY]):
                    self._end = self._store.get(_KEY).decode()
            except RuntimeError:  # the rank that held the store has ended, which breaks this rank's collectives
                return

    def _open_log(self) -> IO[bytes] | int:
        """Return ``rank-N.log``, or stderr if it cannot be opened. The file stays open, as faulthandler needs it."""
        if self._log is None and self.folder is not None:
            try:
                self._log = (self.folder / f"rank-{self.world.rank}.log").open("ab", buffering=0)
            except OSError:  # for example a full disk
                return 2
        return 2 if self._log is None else self._log

    def _write_log(self, title: str, text: str = "") -> str | None:
        """Append a heading and a text to ``rank-N.log`` and return "in PATH", or write the text to stderr."""
        heading = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, rank {self.world.rank}, {title}\n"
        log = self._open_log()
        if not isinstance(log, int):
            try:
                log.write((heading + text).encode())
                return f"in {log.name}"
            except OSError:
                self._log, self.folder = None, None
        os.write(2, text.encode())
        return None

    def _cancel(self) -> None:
        self._deadline, self._set_at = None, -math.inf
        faulthandler.cancel_dump_traceback_later()

    def _close(self) -> None:
        """Stop the timer, and close ``rank-N.log``. Remove the file if nothing was written to it."""
        with self._arming:
            self._ending = True
            self._cancel()
            if self._log is not None:
                self._log.close()
                path = Path(self._log.name)
                with suppress(OSError):  # on a disk that became read-only, the error that ends the run counts
                    if not path.stat().st_size:
                        path.unlink()

    def _leave(self, status: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._close()
        self.leave(status)

    def __enter__(self) -> Watchdog:
        self._reporter.start()
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._reporter.join()
        self._listener.join(_PATIENCE)
        self._close()


def _report(line: str) -> None:
    print(f"fasttrain: {printable(line)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
