"""The CPU cores that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return the number of cores that the process may use: its CPU affinity, and the quota of its container.

    Docker's ``--cpus 2`` and Kubernetes' limits leave the affinity at all cores of the machine. More threads than the
    quota make the kernel pause the process for most of each period.
    """
    quotas = [quota for path in control_groups("cpu") if (quota := _quota(path)) is not None]
    return max(1, math.floor(min([len(os.sched_getaffinity(0)), *quotas])))


def control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of all groups that contain it, for both versions."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = _CGROUP
        elif controller in controllers.split(","):
            root = _CGROUP / controller
        else:
            continue
        group = Path(path.lstrip("/"))
        yield from (root / part for part in (group, *group.parents))


def _quota(folder: Path) -> float | None:
    """Return the number of cores that a control group grants, or None without a limit."""
    try:
        if (file := folder / "cpu.max").is_file():  # version 2: "200000 100000" or "max 100000"
            quota, period = file.read_text().split()
        else:  # version 1: -1 is no limit
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
