"""What the kernel benchmarks measure with: threads, time, memory, the rate of plain products, and the machine."""

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


_LONGEST_LEAD = 0.03  # seconds of work before a call that is timed: longer ones are not held up by their start


def prepare(threads: int) -> None:
    """Fix the number of threads of everything that runs here. To be called before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    import torch

    torch.set_num_threads(threads)


def seconds_per_call(call: Callable[[], Any], calls: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


class DeviceClock:
    """Seconds of one call by the GPU's own clock, after a call that only warms up and with an empty L2 cache.

    The GPU is kept busy until the host has started all of the call's kernels, as a training step keeps it: what the
    host needs is ``host_seconds``. ``call`` must not wait for the device itself.
    """

    def __init__(self) -> None:
        import torch

        self._l2 = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # more than any GPU's
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
    """Least time in which a call has come back, its kernels started but on a GPU not done."""
    return min(_issued(call) for _ in range(times))


def _issued(call: Callable[[], Any]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return seconds_per_call(call)


def in_turn(timers: Sequence[Callable[[], float]], *, fewest: int, most: int, seconds: float) -> list[list[float]]:
    """What each timer says, round by round; who goes first moves on. No new round once ``seconds`` have passed."""
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
    """The processor's own rate: fp32 products of two 4096 x 4096 matrices, timed between the benchmarks."""

    flops = 2 * _SGEMM_SIZE**3

    def __init__(self, device: str = "cpu") -> None:
        self.rates: list[float] = []
        self.device = device
        self._operands: tuple[Any, ...] = ()

    def __call__(self) -> None:
        """One product."""
        import torch

        if not self._operands:
            self._operands = tuple(torch.rand(3, _SGEMM_SIZE, _SGEMM_SIZE, device=self.device).unbind())
        a, b, out = self._operands
        torch.mm(a, b, out=out)
        if self.device != "cpu":
            torch.cuda.synchronize()

    def measure(self, times: int = 3) -> None:
        """Add a few to the record; the first product of all only warms up."""
        if not self.rates:
            self()
        self.rates += [self.flops / seconds_per_call(self) for _ in range(times)]

    @property
    def best(self) -> float:
        """Operations a second, of the fastest product so far."""
        return max(self.rates)


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that ``call`` holds at once beyond what was held before it, results and gradients included.

    On the CPU: every allocation and release that torch's allocator reports to the profiler, those inside custom
    operators, compiled code, out= and in-place calls too. Not seen: what a library takes from elsewhere (KeOps' and
    MKL's own scratch). Run ``call`` once before, so that caches and compilation do not count.
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
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Bystanders:
    """How much of the machine other processes use, from the making of this object on."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), busy_seconds() - time.process_time()

    def part(self) -> float:
        """Of all cores; 0 on a quiet machine."""
        elapsed, others = time.perf_counter() - self._start[0], busy_seconds() - time.process_time() - self._start[1]
        return max(0.0, others / elapsed / (os.cpu_count() or 1))


def busy_seconds() -> float:
    """CPU seconds of all the machine since it started, those that its host gave to others included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Everything that a reader needs to know beside a figure."""
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
    """The commit that runs, or why it is not known: a copy without git's folder, or no git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git here"
    return done.stdout.strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def title(about: dict[str, Any]) -> str:
    """The machine in one line."""
    where = "" if about["device"] == "cpu" else f", {about['device']}"
    packages = ", ".join(f"{name} {about[name]}" for name in _PACKAGES)
    return (
        f"{about['processor']}{where}, {about['threads']} threads on {about['cores']} cores, "
        f"load {about['load_before']:.2f} before; python {about['python']}, {packages}"
    )
