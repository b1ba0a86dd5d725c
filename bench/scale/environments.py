"""Environment variables for the ranks of one machine without a launcher."""

from __future__ import annotations

import socket


def environments(size: int) -> list[dict[str, str]]:
    """Return the variables of each of ``size`` ranks. MASTER_PORT is a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
