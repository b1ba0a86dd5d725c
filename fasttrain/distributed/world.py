"""Ranks, devices and threads: everything that depends on how the process was launched."""

from __future__ import annotations

import ctypes
import os
import socket
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ConfigError
from .cpus import usable_cores
from .deepspeed_names import disable_shared_memory_reduction
from .launchers import launched

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> World:
        """Return the world that ``deepspeed`` or ``torchrun`` set in the environment, or a world of one rank.

        Raises ConfigError for a variable that is no whole number, and for a rank beyond the world.
        """
        world = cls(
            rank=_variable("RANK", default=0),
            size=_variable("WORLD_SIZE", default=1),
            local_rank=_variable("LOCAL_RANK", default=0),
            local_size=_variable("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=1),
        )
        if world.rank >= world.size:
            raise ConfigError(f"RANK: must be below WORLD_SIZE ({world.size}), got {world.rank}. {_START_AGAIN}")
        return world

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """This rank's share of the cores that its container may use."""
        return max(1, usable_cores() // self.local_size)


_START_AGAIN = "Unset the variable, or start the ranks with torchrun or deepspeed."


def _variable(*names: str, default: int) -> int:
    """Return the number in the first environment variable that is set."""
    for name in names:
        if value := os.environ.get(name):
            if not value.isdecimal() or (default == 1 and int(value) < 1):
                raise ConfigError(
                    f"{name}: must be a whole number of at least {default}, got {value!r}. {_START_AGAIN}"
                )
            return int(value)
    return default


def prepare_environment() -> None:
    """Set the environment variables that torch and DeepSpeed read at import. Call it before importing either.

    The ranks of ``srun`` and ``mpirun`` get the variables of ``torchrun``, see :func:`.launchers.launched`.
    Two OpenMP teams that each use all cores and spin at their barriers run 15 times slower than one. So every rank gets
    its share of the cores, and ranks that share a machine sleep at their barriers. Raises ConfigError, like
    :meth:`World.from_environment`.
    """
    os.environ.update(launched(os.environ))
    world = World.from_environment()
    if world.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(world.threads)
    if world.local_size > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # fasttrain prints one line per failure, without C++ frames
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_nvidia_device() else "cpu")


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel. For a command's own process only.

    By default glibc returns tensors of many megabytes to the kernel, which zeroes their pages again at the next step.
    This costs 7 % of a step on two CPU cores. Settings in the environment (MALLOC_*_) and other C libraries are not
    changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option, name, value in (
        (_M_MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_", 1 << 30),
        (_M_TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_", 1 << 30),
        (_M_TOP_PAD, "MALLOC_TOP_PAD_", 64 << 20),
    ):
        if name not in os.environ:
            mallopt(option, value)


def has_nvidia_device() -> bool:
    """Return whether an NVIDIA driver's device exists. Asking torch would import it before its threads are set."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")


def initialise(world: World) -> None:
    """Start the process group through DeepSpeed: NCCL on GPUs, gloo on the CPU, also for a world of one.

    Raises ConfigError if the ranks could not find each other. Each would wait at an address of its own.
    """
    import deepspeed
    import torch

    if torch.distributed.is_initialized():
        return
    _check_meeting_point(world)
    values = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank, "MASTER_ADDR": "127.0.0.1"}
    for name, value in values.items():
        os.environ.setdefault(name, str(value))
    own_port = "MASTER_PORT" not in os.environ
    alone = world.size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ  # torchrun itself listens at its port
    if own_port or (alone and not _is_free(os.environ["MASTER_PORT"])):
        os.environ["MASTER_PORT"] = str(_free_port())
    elif os.environ.get("CROSS_SIZE") == "1" and os.environ["MASTER_PORT"] == _DEEPSPEED_PORT:
        os.environ["MASTER_PORT"] = str(_port_of_launcher(os.getppid()))
    disable_shared_memory_reduction()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(world.local_rank)
    try:
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"MASTER_PORT: port {os.environ['MASTER_PORT']} is used by another program. "
            "Give the launcher a free one with --master_port."
        ) from None
    if own_port:  # a command that is started from this process, for example from a notebook, needs another port
        del os.environ["MASTER_PORT"]


def all_gather_object(world: World, value: T) -> list[T]:
    """Return every rank's value, in the order of the ranks. The values must be picklable. Collective."""
    import torch.distributed as dist

    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def _check_meeting_point(world: World) -> None:
    if world.size == 1:
        return
    for name in ("RANK", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(
                f"{name}: is missing, and WORLD_SIZE is {world.size}. Export it on every rank. {_START_AGAIN}"
            )
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"MASTER_PORT: must be a number from 1 to 65535, got {port!r}. {_START_AGAIN}")


_DEEPSPEED_PORT = "29500"


def _port_of_launcher(launcher: int) -> int:
    """Return the port for the ranks that one ``deepspeed`` process started on one machine.

    Two runs on one machine would both get the default port. The ranks cannot agree on a free port before they are
    connected, but they all know the number of the process that started them. The range ends below the ports that the
    kernel gives to clients.
    """
    return 20_000 + launcher % 9_000


def _is_free(port: str) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", int(port)))
        except (OSError, ValueError, OverflowError):
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
