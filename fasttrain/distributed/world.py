"""Ranks, devices and threads: everything that depends on how the process was launched."""

from __future__ import annotations

import ctypes
import os
import socket
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    @property
    def threads(self) -> int:
        """This rank's share of the machine's cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_size)


def world_from_environment() -> World:
    """Read what ``deepspeed`` or ``torchrun`` put into the environment; a plain process is a world of one."""
    get = os.environ.get
    return World(
        rank=int(get("RANK", "0")),
        size=int(get("WORLD_SIZE", "1")),
        local_rank=int(get("LOCAL_RANK", "0")),
        local_size=int(get("LOCAL_WORLD_SIZE") or get("LOCAL_SIZE") or "1"),
    )


def prepare_environment() -> None:
    """Set what torch and DeepSpeed read when they are imported. Call it before importing either.

    Two OpenMP teams that each take all cores and spin at their barriers run 15 times slower than one, so every rank
    gets its share of the cores, and ranks that share a machine sleep at their barriers.
    """
    world = world_from_environment()
    if world.local_size > 1 or "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(world.threads)
    if world.local_size > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of ranks that end we say one line, without C++ frames
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_nvidia_device() else "cpu")


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one.

    By default it hands tensors of many megabytes back to the kernel, which zeroes their pages again a moment later:
    7 % of a step on two CPU cores. What is set in the environment (MALLOC_*_) stays; other C libraries are left alone.
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
    """Whether the driver's device is there; asking torch would import it before its threads are set."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")


def initialise(world: World) -> None:
    """Start the process group through DeepSpeed: NCCL on GPUs, gloo on the CPU, also for a world of one."""
    import deepspeed
    import torch

    if torch.distributed.is_initialized():
        return
    values = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank, "MASTER_ADDR": "127.0.0.1"}
    for name, value in values.items():
        os.environ.setdefault(name, str(value))
    own_port = "MASTER_PORT" not in os.environ
    if own_port:
        os.environ["MASTER_PORT"] = str(_free_port())
    # DeepSpeed would compile a shared-memory all-reduce at the first start: 15 to 50 s and a C++ compiler, which a
    # user's machine need not have. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(world.local_rank)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    if own_port:  # a command that is started from here, as from a notebook, needs another
        del os.environ["MASTER_PORT"]


def everyone(world: World, mine: T) -> list[T]:
    """What every rank has, in the order of the ranks; plain values only. Collective."""
    import torch.distributed as dist

    found = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(found, mine)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
