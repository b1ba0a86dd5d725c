"""Fixtures of the benchmarks: ``pytest bench/ --benchmark-only [--threads 2] [--device cpu]``.

Contestants that could not run are listed with the reason at the end, and in the JSON file of --benchmark-json.
``bench/tests`` is a suite of its own: ``python -m pytest bench/tests``. A run of benchmarks leaves it out, because the
suite needs Triton's interpreter and other threads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest

from bench import measure

_RECORD = pytest.StashKey["Record"]()
_TESTS = Path(__file__).parent / "tests"


class Record:
    """Hold the data of the whole session."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.about = measure.machine(device)
        self.sgemm = measure.Sgemm(device)
        self.not_run: list[dict[str, str]] = []
        self.peak_bytes = cache(self._peak_bytes)

    def _peak_bytes(self, operation: Any, name: str, case: Any) -> int:
        step = operation.step(name, case)
        step()
        return measure.peak_bytes(step, self.device)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernel benchmarks")
    group.addoption("--threads", type=int, default=2, help="threads of torch, OpenMP and MKL (default 2)")
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="device of the tensors")
    for name in ("cifar10", "imagenet"):
        group.addoption(f"--{name}", type=Path, metavar="DIR", help="folder of JPEGs, for the loader's benchmark")


def pytest_configure(config: pytest.Config) -> None:
    if _only_tests(config):
        _prepare_tests()
        return
    measure.prepare(config.getoption("--threads"))
    config.stash[_RECORD] = Record(config.getoption("--device"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path == _TESTS and not _only_tests(config) else None


def _only_tests(config: pytest.Config) -> bool:
    """Return whether the command line selects no benchmarks: no folder of bench/ other than bench/tests."""
    folder = config.invocation_params.dir
    paths = [(folder / argument.partition("::")[0]).resolve() for argument in config.args]
    bench = _TESTS.parent
    return not any(
        bench.is_relative_to(path) or (path.is_relative_to(bench) and not path.is_relative_to(_TESTS)) for path in paths
    )


def _prepare_tests() -> None:
    """Set threads and the interpreter before torch and Triton are imported, as tests/conftest.py does."""
    from fasttrain.distributed.world import has_nvidia_device, prepare_environment

    prepare_environment()
    if not has_nvidia_device():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Write the machine in one line; pytest shows no header with -q."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    record = session.config.stash.get(_RECORD, None)
    if reporter is not None and record is not None:
        reporter.write_line(measure.title(record.about))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    record = config.stash.get(_RECORD, None)
    if record is None:
        return
    if record.sgemm.rates:
        rates = ", ".join(f"{rate / 1e9:.0f}" for rate in record.sgemm.rates)
        terminalreporter.section("sgemm, fp32 4096^3")
        terminalreporter.write_line(f"best {record.sgemm.best / 1e9:.0f} of {rates} GFLOP/s")
    if record.not_run:
        terminalreporter.section("not run")
    for entry in record.not_run:
        terminalreporter.write_line("{operation}, {case}, {contestant}: {reason}".format(**entry))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fasttrain"] = config.stash[_RECORD].about


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    record = config.stash[_RECORD]
    output_json["not_run"] = record.not_run
    output_json["sgemm_gflops"] = [round(rate / 1e9, 1) for rate in record.sgemm.rates]


@pytest.fixture
def not_run(request: pytest.FixtureRequest) -> Callable[[str, str, str, str], NoReturn]:
    """Return a function that skips the test and lists the reason at the end."""

    def skip(operation: str, case: str, contestant: str, reason: str) -> NoReturn:
        entry = {"operation": operation, "case": case, "contestant": contestant, "reason": reason}
        request.config.stash[_RECORD].not_run.append(entry)
        pytest.skip(f"not run: {reason}")

    return skip


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest, not_run: Any) -> Callable[[Any, str, Any], None]:
    """Return a function that checks one contestant against ours, then measures its memory and its time."""
    from bench.peers import OURS, NotRun, check_agreement

    record = request.config.stash[_RECORD]

    def run(operation: Any, name: str, case: Any) -> None:
        case = replace(case, device=record.device)
        benchmark.group = f"{operation.name} {case.name}"
        try:
            step = operation.step(name, case)
            outputs = step()
        except NotRun as reason:
            not_run(operation.name, case.name, name, str(reason))
        if name != OURS:
            check_agreement(outputs, operation.step(OURS, case)(), name)
        del outputs
        peak = record.peak_bytes(operation, name, case)
        benchmark.extra_info |= {
            "contestant": name,
            "threads": record.about["threads"],
            "peak_mib": round(peak / 2**20, 3),
        }
        with contextlib.suppress(NotRun):  # the baseline may be missing
            baseline = record.peak_bytes(operation, operation.baseline, case)
            benchmark.extra_info[f"peak_over_{operation.baseline}"] = round(peak / baseline, 5)
        rated = name == OURS and operation.flops is not None
        if rated:
            record.sgemm.measure()
        benchmark(step)
        if rated and benchmark.stats is not None:  # None with --benchmark-disable
            record.sgemm.measure(1)
            stats, work = benchmark.stats.stats, operation.flops(case) / record.sgemm.best
            benchmark.extra_info |= {
                "pct_sgemm": round(100 * work / stats.min, 1),
                "pct_sgemm_of_median": round(100 * work / stats.median, 1),
                "sgemm_gflops": round(record.sgemm.best / 1e9, 1),
            }

    return run
