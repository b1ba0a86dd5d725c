"""Ranks of ``srun`` and ``mpirun``. Without RANK, N tasks of ``srun`` would be N separate runs in one folder."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError

_PORTS = range(20_000, 32_000)
"""The ports that the kernel gives to clients begin above this range."""


@dataclass(frozen=True)
class _Launcher:
    """A launcher's variables: the rank's place, and a text that is the same on all ranks of one start only."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    start: tuple[str, ...]


_MPI = (
    _Launcher(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Launcher("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_PORT",)),
)


def launched(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables RANK to MASTER_PORT for a rank that ``srun`` or ``mpirun`` started; nothing for others.

    ``torchrun`` and ``deepspeed`` set RANK themselves, which has priority. A batch script of SLURM has SLURM_NTASKS and
    SLURM_PROCID too, but is no task of ``srun``. Raise ConfigError if a variable is missing that cannot be derived.
    """
    if environment.get("RANK") or environment.get("WORLD_SIZE"):
        return {}
    if _count(environment, "SLURM_STEP_NUM_TASKS") > 1 or (
        _count(environment, "SLURM_PROCID") > 0 and "SLURM_STEP_NUM_TASKS" not in environment
    ):
        values = _of_srun(environment)
        return _complete(values, environment, "srun", "$SLURM_PROCID", "$SLURM_NTASKS", "$SLURM_LOCALID")
    for launcher in _MPI:
        if _count(environment, launcher.size) > 1:
            values = _of_mpi(environment, launcher)
            names = (f"${launcher.rank}", f"${launcher.size}", f"${launcher.local_rank}")
            return _complete(values, environment, launcher.name, *names)
    return {}


def _of_srun(environment: Mapping[str, str]) -> dict[str, str | None]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    job, step = _count(environment, "SLURM_JOB_ID"), _count(environment, "SLURM_STEP_ID")
    return {
        "RANK": environment.get("SLURM_PROCID"),
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS"),
        "LOCAL_RANK": environment.get("SLURM_LOCALID"),
        "LOCAL_WORLD_SIZE": _tasks_of_node(tasks, _count(environment, "SLURM_NODEID")),
        # Not SLURM_LAUNCH_NODE_IPADDR: srun may have been started on a login node, where rank 0 is not.
        "MASTER_ADDR": _first_host(nodes),
        "MASTER_PORT": str(_PORTS[(job + 1_000 * step) % len(_PORTS)]) if job else None,
    }


def _of_mpi(environment: Mapping[str, str], launcher: _Launcher) -> dict[str, str | None]:
    size, local_size = environment.get(launcher.size), environment.get(launcher.local_size)
    start = next((environment[name] for name in launcher.start if environment.get(name)), None)
    return {
        "RANK": environment.get(launcher.rank),
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get(launcher.local_rank),
        "LOCAL_WORLD_SIZE": local_size,
        "MASTER_ADDR": "127.0.0.1" if size == local_size else None,  # mpirun names no other host
        "MASTER_PORT": None if start is None else str(_PORTS[zlib.crc32(start.encode()) % len(_PORTS)]),
    }


def _complete(
    values: Mapping[str, str | None], environment: Mapping[str, str], launcher: str, *names: str
) -> dict[str, str]:
    known = {name: environment.get(name) or value for name, value in values.items()}
    if missing := [name for name, value in known.items() if not value]:
        rank, size, local_rank = names
        raise ConfigError(
            f"{missing[0]}: is missing, and {launcher} started this process as one of {values['WORLD_SIZE']} ranks. "
            f"Export RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank}, LOCAL_WORLD_SIZE, MASTER_ADDR (the host of "
            "rank 0) and MASTER_PORT; for separate runs, export RANK=0 WORLD_SIZE=1."
        )
    return {name: value for name, value in known.items() if value}


def _count(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0


def _first_host(nodes: str) -> str | None:
    """Return the first name of a list such as ``gpu[03-05,9],login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else None


def _tasks_of_node(tasks: str, node: int) -> str | None:
    """Return the number of tasks on a node, from a list such as ``8(x3),4``."""
    counts: list[str] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [count] * int(repeats or 1)
    return counts[node] if node < len(counts) else None
