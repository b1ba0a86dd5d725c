"""A rank that fails, or a step that hangs, ends all ranks within seconds and says why; collectives would wait on."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import Crashed
from .world import World

_KEY = "fasttrain/end"  # in the process group's store: "<status> <crash or hang> <rank>" of the first rank that ends
_PERIOD = 0.5  # seconds between looks at the store
_PATIENCE = 5.0  # seconds for an answer of the store, whose machine may be out of reach
_LINGER = 4 * _PERIOD  # before a rank goes that said why, since the store may go with it
CRASHED = 1  # exit status


def first_to_end(world: World, status: int = CRASHED, kind: str = "crash", *, store: Any = None) -> bool:
    """Whether no rank has said before why all end: then this one is to say it, and the others go without a word.

    Every other rank's watchdog ends its process with ``status``. A thread beside the training needs its own connection
    to the ``store``, opened while the rank that holds it was there: the training may wait on the process group's, and
    a new one would be tried for half an hour.
    """
    if world.size == 1 or not dist.is_initialized():
        return world.is_main
    mine = f"{status} {kind} {world.rank}"
    first: list[bool] = []

    def ask() -> None:
        try:
            first.append(bool((store or _get_default_store()).compare_set(_KEY, "", mine).decode() == mine))
        except RuntimeError:  # the store went with the rank that held it
            first.append(True)

    # Where the link to the store's machine is cut, TCP waits for it much longer than anybody should.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return first[0] if first else True


def linger(world: World) -> None:
    """Stay until the other ranks have seen that this one ends."""
    if world.size > 1 and dist.is_initialized():
        time.sleep(_LINGER)


@contextmanager
def starting(world: World, minutes: float, *, leave: Callable[[int], None] = os._exit) -> Iterator[None]:
    """For the start of the process group: if it takes longer than ``minutes`` (0: never mind) this process ends.

    It says so in a line, whatever the rank: where one never came, the others cannot agree on who speaks.
    """

    def end() -> None:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        _say(
            f"rank {world.rank} waited {minutes:g} minutes (--watchdog_minutes) at {where} for all "
            f"{world.size} ranks to start; look at what the others say, then start all of them"
        )
        leave(CRASHED)

    timer = threading.Timer(minutes * 60, end)
    timer.daemon = True
    if world.size > 1 and minutes:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Watchdog:
    """A thread beside the training of one rank, started when it is entered.

    If no step finishes for ``minutes`` (0: never mind) it writes the stacks of all threads into ``rank-N.log`` and ends
    the process with status 1; if another rank has failed it ends the process with that rank's status. Time under
    :meth:`suspended` does not count. ``leave`` ends the process, without the cleaning up that waits for other ranks.
    """

    def __init__(self, world: World, minutes: float, *, leave: Callable[[int], None] = os._exit) -> None:
        self.world, self.limit, self.leave = world, minutes * 60, leave
        self.folder: Path | None = None
        """The run's folder, once it is known."""
        self._since: float | None = None
        self._store = _get_default_store().clone() if world.size > 1 else None
        self._end: str | None = None
        """Why all ranks are to end, once one has said so."""
        self._stopped = threading.Event()
        self._told = threading.Lock()  # held by the thread that says why this process ends
        self._thread = threading.Thread(target=self._watch, name="fasttrain-watchdog", daemon=True)
        # Apart, since an answer may never come.
        self._listener = threading.Thread(target=self._listen, name="fasttrain-listener", daemon=True)

    def step_done(self) -> None:
        """A step has finished, or the first one begins."""
        self._since = time.monotonic()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """For work between steps that may take long."""
        self._since, before = None, self._since
        try:
            yield
        finally:
            self._since = None if before is None else time.monotonic()

    def crashed(self, error: BaseException) -> Crashed:
        """Write the traceback and say in one line which rank failed and why.

        On one rank the line is in what is returned, to be raised; on several the process ends here.
        """
        first = str(error).strip().partition("\n")[0]
        what = f"rank {self.world.rank} failed: {type(error).__name__}{': ' if first else ''}{first}"
        if self.world.size == 1 or (self._told.acquire(blocking=False) and first_to_end(self.world)):
            text = "".join(traceback.format_exception(error))
            what = f"{what}; {self._record('its traceback is', lambda fd: os.write(fd, text.encode()))}"
            if self.world.size > 1:
                _say(what)
        if self.world.size > 1:
            linger(self.world)
            self.leave(CRASHED)
        return Crashed(what)

    def _watch(self) -> None:
        while not self._stopped.wait(_PERIOD):
            if self.limit and self._since is not None and time.monotonic() - self._since > self.limit:
                where = self._record("the stacks of all threads are", faulthandler.dump_traceback)
                if self._told.acquire(blocking=False) and first_to_end(self.world, CRASHED, "hang", store=self._store):
                    rank, minutes = self.world.rank, self.limit / 60
                    _say(f"rank {rank} finished no step for {minutes:g} minutes (--watchdog_minutes); {where}")
                linger(self.world)
                return self.leave(CRASHED)
            if self._end is not None:
                status, kind, _ = self._end.split()
                if kind == "hang":
                    self._record("stacks", faulthandler.dump_traceback)
                _flush()
                return self.leave(int(status))

    def _listen(self) -> None:
        while self._store is not None and self._end is None and not self._stopped.wait(_PERIOD):
            try:
                if self._store.check([_KEY]):
                    self._end = self._store.get(_KEY).decode()
            except RuntimeError:  # the rank that held the store has ended; what it breaks will be seen
                return

    def _record(self, what: str, write: Callable[[int], object]) -> str:
        """Write into ``rank-N.log``, or to stderr where there is no such folder; says where ``what`` is."""
        try:
            if self.folder is None:
                raise FileNotFoundError
            path = self.folder / f"rank-{self.world.rank}.log"
            with path.open("a") as log:
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}, rank {self.world.rank}, {what} below\n")
                log.flush()
                write(log.fileno())
            return f"{what} in {path}"
        except OSError:  # a full disk too
            write(2)
            return f"{what} above"

    def __enter__(self) -> Watchdog:
        self._thread.start()
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._listener.join(_PATIENCE)


def _say(line: str) -> None:
    print(f"fasttrain: {line}", file=sys.stderr)
    _flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
