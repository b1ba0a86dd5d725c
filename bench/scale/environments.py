"""Ranks of one machine without a launcher: their environment variables, and a run of all of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from bench import ROOT


def environments(size: int) -> list[dict[str, str]]:
    """Return the variables of each of ``size`` ranks. MASTER_PORT is a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run_ranks(size: int, module: str, arguments: Sequence[str], *, seconds: float) -> None:
    """Run ``python -m module arguments`` as ``size`` ranks with one thread each, for at most ``seconds``.

    Raise RuntimeError if a rank fails.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "error"}
    ranks = [subprocess.Popen(command, cwd=ROOT, env=os.environ | common | one) for one in environments(size)]
    try:
        ended = [rank.wait(seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(ended):
        raise RuntimeError(f"{module}: the ranks ended with statuses {ended}")
