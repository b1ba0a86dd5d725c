"""Python's garbage collection at the same steps on all ranks.

By default a rank collects whenever its own allocations trigger it, for some tens of milliseconds, and all other ranks
wait for it at the next reduction. With many ranks one of them collects at almost every step.
"""

from __future__ import annotations

import gc
from types import TracebackType

_EVERY = 50
"""Steps between collections of young objects."""


class GarbageCollection:
    """A context without automatic collection, in which :meth:`step_done` collects. One rank changes nothing.

    At its end, collection is as automatic as before. It applies to the whole process, as Python's collector does.
    """

    def __init__(self, ranks: int) -> None:
        self._together = ranks > 1
        self._automatic = False

    def step_done(self, step: int, *, ends_epoch: bool) -> None:
        """Collect young objects every :data:`_EVERY` steps and all objects at the end of an epoch."""
        if self._together and (ends_epoch or step % _EVERY == 0):
            gc.collect(2 if ends_epoch else 1)

    def __enter__(self) -> GarbageCollection:
        self._automatic = gc.isenabled()
        if self._together:
            gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._together and self._automatic:
            gc.enable()
