"""A lock on the folder of a run: two runs in one folder would destroy each other's files."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from ..distributed.world import World, all_gather_object
from ..errors import ConfigError

LOCK = "run.lock"
"""The lock's file, with the process that holds it. It exists while the run is going on."""


class FolderLock:
    """A context that holds the lock of a run's folder on rank 0.

    The system frees the lock when its process ends, however that happens. So a file that is left behind locks nothing.
    Raise ConfigError, on all ranks, if another process holds the lock. Collective.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.path, self.world = folder / LOCK, world
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        holder = self._acquire() if self.world.is_main else None
        if holder := all_gather_object(self.world, holder)[0]:
            raise ConfigError(
                f"--output_dir {self.path.parent}: is in use by {holder}. Wait for its end, or choose another folder."
            )
        return self

    def _acquire(self) -> str | None:
        """Take the lock; return a description of the process that holds it instead, if any."""
        while True:
            file = self.path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without locks
                    file.close()
                    return None
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                return holder
            if self._is_current(file):
                break
            file.close()  # its holder removed it in the meantime
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
        return None

    def _is_current(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            with suppress(OSError):  # the folder may be gone
                self.path.unlink()
            self._file.close()
            self._file = None
