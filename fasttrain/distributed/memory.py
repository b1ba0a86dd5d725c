"""The host memory that this process may still use."""

from __future__ import annotations

from pathlib import Path

from .cpus import control_groups


def available_memory() -> int:
    """Return the bytes of host memory that are free or hold files, within the limits of the process's container."""
    import psutil

    rooms = (_room(folder) for folder in control_groups("memory"))
    return max(0, min([int(psutil.virtual_memory().available), *(room for room in rooms if room is not None)]))


def _room(folder: Path) -> int | None:
    """Return the bytes that a control group has left, or None without a limit. Pages of files are freed on demand."""
    try:
        if (folder / "memory.max").is_file():  # version 2
            limit, used, pages = "memory.max", "memory.current", "inactive_file"
        else:
            limit, used, pages = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / limit).read_text()) - int((folder / used).read_text()) + int(statistics.get(pages, 0))
    except (OSError, ValueError):  # also "max"
        return None
