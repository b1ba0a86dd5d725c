"""Measure for the benchmarks: threads, time, memory, the rate of plain matrix products, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import ROOT

_SGEMM_SIZE = 4096
_PACKAGES = (
    "torch",
    "triton",
    "lightly",
    "pytorch-metric-learning",
    "pykeops",
    "info-nce-pytorch",
    "inf-cl",
    "nvidia-dali-cuda130",
    "torchvision",
)


_LONGEST_LEAD = 0.03  # seconds of work before a timed call; a longer call is not delayed by its launches


def prepare(threads: int) -> None:
    """Set the number of threads of torch, OpenMP and MKL. Call it before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler
    import torch

    torch.set_num_threads(threads)


def seconds_per_call(call: Callable[[], Any], calls: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


class DeviceClock:
    """Time one call by the GPU's clock, after a warm-up call and with an empty L2 cache.

    The GPU stays busy until the host has launched all kernels of the call, as in a training step. ``host_seconds``
    measures the launches. ``call`` must not wait for the device.
    """

    def __init__(self) -> None:
        import torch

        self._l2 = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # larger than the L2 cache of any GPU
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._clear = min(self._between(self._l2.zero_) for _ in range(3))

    def seconds(self, call: Callable[[], Any]) -> float:
        lead = min(1.5 * _issued(call) + 2e-4, _LONGEST_LEAD)
        for _ in range(1 + int(lead / self._clear)):
            self._l2.zero_()
        return self._between(call)

    def _between(self, call: Callable[[], Any]) -> float:
        import torch

        self._events[0].record()
        call()
        self._events[1].record()
        torch.cuda.synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1e3


def host_seconds(call: Callable[[], Any], times: int = 5) -> float:
    """Return the shortest time until a call returns; on a GPU its kernels are launched then, but not finished."""
    return min(_issued(call) for _ in range(times))


def _issued(call: Callable[[], Any]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return seconds_per_call(call)


def in_turn(timers: Sequence[Callable[[], float]], *, fewest: int, most: int, seconds: float) -> list[list[float]]:
    """Return the times of each timer, round by round. The first timer of a round changes with every round.

    No round starts after ``seconds``, except the ``fewest`` first ones.
    """
    started = time.perf_counter()
    times: list[list[float]] = [[] for _ in timers]
    for number in range(most):
        if number >= fewest and time.perf_counter() - started >= seconds:
            break
        for place in range(len(timers)):
            turn = (number + place) % len(timers)
            times[turn].append(timers[turn]())
    return times


def least_and_median(values: Sequence[float]) -> dict[str, float]:
    return {name: float(f"{f(values):.4g}") for name, f in (("min", min), ("median", statistics.median))}


class Sgemm:
    """Measure the rate of plain fp32 products of two 4096 x 4096 matrices between the benchmarks."""

    flops = 2 * _SGEMM_SIZE**3

    def __init__(self, device: str = "cpu") -> None:
        self.rates: list[float] = []
        self.device = device
        self._operands: tuple[Any, ...] = ()

    def __call__(self) -> None:
        """Compute one product."""
        import torch

        if not self._operands:
            self._operands = tuple(torch.rand(3, _SGEMM_SIZE, _SGEMM_SIZE, device=self.device).unbind())
        a, b, out = self._operands
        torch.mm(a, b, out=out)
        if self.device != "cpu":
            torch.cuda.synchronize()

    def measure(self, times: int = 3) -> None:
        """Time ``times`` products. The first product of all is a warm-up."""
        if not self.rates:
            self()
        self.rates += [self.flops / seconds_per_call(self) for _ in range(times)]

    @property
    def best(self) -> float:
        """Return the operations per second of the fastest product."""
        return max(self.rates)


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """Return the peak memory of ``call`` in bytes beyond the memory in use before it, results and gradients included.

    On the CPU the profiler reports every allocation and release of torch's allocator, also in custom operators,
    compiled code, out= and in-place calls. It misses memory of other allocators (scratch of KeOps and MKL). Run
    ``call`` once before, so that caches and compilation do not count.
    """
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


class Bystanders:
    """Measure the share of the machine that other processes use, from the construction of this object on."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), busy_seconds() - time.process_time()

    def part(self) -> float:
        """Return the share of all cores; 0 on a quiet machine."""
        elapsed, others = time.perf_counter() - self._start[0], busy_seconds() - time.process_time() - self._start[1]
        return max(0.0, others / elapsed / (os.cpu_count() or 1))


def busy_seconds() -> float:
    """Return the CPU seconds of the machine since its start, including time that its host gave to other machines."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return processor, threads, device, load and package versions, which belong to every figure."""
    import torch

    about = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            about[package] = torch.__version__ if package == "torch" else version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    return about


def commit() -> str:
    """Return the current commit, or a text if git or its folder is missing."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git here"
    return process.stdout.strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def title(about: dict[str, Any]) -> str:
    """Return the machine in one line."""
    device = "" if about["device"] == "cpu" else f", {about['device']}"
    packages = ", ".join(f"{name} {about[name]}" for name in _PACKAGES)
    return (
        f"{about['processor']}{device}, {about['threads']} threads on {about['cores']} cores, "
        f"load {about['load_before']:.2f} before; python {about['python']}, {packages}"
    )
