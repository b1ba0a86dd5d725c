"""Start the ranks of the real command as ``srun`` does: no launcher ends the others when one rank ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TRAINER = str(ROOT / "fasttrain/run.py")


class Ranks:
    """Processes of one start of the command. Their output is in ``logs``, written by a reader each if ``piped``."""

    def __init__(
        self, flags: Sequence[str], count: int, logs: Path, environment: dict[str, str], *, piped: bool = False
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        port = str(_free_port())
        base = {name: value for name, value in os.environ.items() if name not in _LAUNCHER} | environment
        base |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.logs, self.processes, self.readers = logs, [], []
        for rank in range(count):
            values = (rank, count, rank, count, "127.0.0.1", port)
            own = dict(zip(_LAUNCHER, map(str, values), strict=True)) if count > 1 else {}
            with (logs / f"out-{rank}").open("wb") as out, (logs / f"err-{rank}").open("wb") as err:
                reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) if piped else None
                command = [sys.executable, _TRAINER, *flags]
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=base | own,
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=reader.stdin if reader else out,
                        stderr=err,
                    )
                )
                if reader is not None and reader.stdin is not None:
                    reader.stdin.close()  # the rank has the only end that writes
                    self.readers.append(reader)

    def close_outputs(self) -> None:
        """End the readers of the standard output."""
        for reader in self.readers:
            reader.kill()
            reader.wait()

    @property
    def running(self) -> bool:
        """Return whether every rank runs."""
        return all(process.poll() is None for process in self.processes)

    def kill(self, ranks: Sequence[int] | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to some ranks or to all ranks."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                process.send_signal(number)

    def end(self, seconds: float = 120) -> tuple[list[int | None], float]:
        """Wait for all ranks. Return their statuses and the seconds; a rank that had to be killed has None."""
        started = time.monotonic()
        statuses: list[int | None] = []
        for process in self.processes:
            try:
                statuses.append(process.wait(max(started + seconds - time.monotonic(), 0.1)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                statuses.append(None)
        for reader in self.readers:
            reader.wait()
        return statuses, time.monotonic() - started

    def errors(self) -> list[str]:
        """Return the lines of all ranks on stderr."""
        texts = [(self.logs / f"err-{rank}").read_text(errors="replace") for rank in range(len(self.processes))]
        return [line for text in texts for line in text.splitlines() if line.strip()]

    def output(self) -> str:
        """Return rank 0's text on stdout."""
        return (self.logs / "out-0").read_text(errors="replace")

    def resumed(self) -> int | None:
        """Return the step from which the run resumed, 0 for a new run, None before the run has printed it."""
        out = self.output()
        if match := re.search(r"^resumed after step (\d+)$", out, re.MULTILINE):
            return int(match[1])
        return 0 if re.search(r"^[\d,]+ steps of \d+ images, ", out, re.MULTILINE) else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
