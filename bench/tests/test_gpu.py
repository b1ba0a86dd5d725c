"""Test the run of bench/gpu: its budget, report and exit status. The measurements need a GPU."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from bench import ROOT, measure
from bench.gpu import Budget, DeviceLost, Part, Run, WorkerLost, attempt
from bench.gpu import __main__ as gpu
from bench.peers import NotRun


class Clock:
    """Seconds that a test sets."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def run(tmp_path, clock):
    return Run(tmp_path / "results" / "a.json", {"device": "none"}, Budget(100, clock))


def test_part_stops_at_its_share_and_names_the_rest(run, clock):
    """Rows are on disk before the part ends."""
    rows = run.start(Part("work", print, str, until=0.4))
    for item in run.in_time("abcd"):
        run.add({"item": item})
        clock.now += 20
    assert len(json.loads(run.path.read_text())["parts"]["work"]["rows"]) == 2
    assert run.finish(None) == ["c", "d"]
    written = json.loads(run.path.read_text())["parts"]["work"]
    assert written == {"rows": rows, "left_out": ["c", "d"], "error": None, "seconds": 40.0}
    assert [path.name for path in run.path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("workers", [0, 2])
def test_side_by_side_matches_results_to_items(run, workers):
    run.workers = workers
    assert dict(run.side_by_side(math.sqrt, [1, 4, 9])) == {1: 1.0, 4: 2.0, 9: 3.0}


def test_side_by_side_raises_if_a_worker_dies(run):
    run.workers = 1
    with pytest.raises(WorkerLost, match="in one of: 9"):
        list(run.side_by_side(signal.raise_signal, [9]))


def _fail(error):
    raise error


def _add(run):
    run.add({"x": 1})


@pytest.mark.parametrize(
    ("work", "failures", "stops", "expected", "ended"),
    [
        (_add, lambda rows: [f"x is {rows[0]['x']}"], bool, ["x is 1"], True),
        (_add, lambda rows: ["inaccurate"], lambda rows: False, ["inaccurate"], False),
        (lambda run: _fail(DeviceLost("gone")), None, None, ["check: DeviceLost: gone"], False),
        (lambda run: _fail(ValueError("x")), None, any, ["check: ValueError: x"], True),
        (_add, lambda rows: [], lambda rows: False, [], False),
    ],
    ids=["wrong", "inaccurate", "error in a part", "error in a deciding part", "right"],
)
def test_run_parts_reports_failures(run, capsys, work, failures, stops, expected, ended):
    check = Part("check", work, str, 1, failures, stops)
    assert gpu.run_parts(run, [check, Part("time", _add, str, 1)]) == bool(expected)
    content = json.loads(run.path.read_text())
    assert content["failures"] == expected
    assert list(content["parts"]) == ["check", "time"][: 1 if ended else 2]
    printed = capsys.readouterr().out
    assert all(f"**{line}**" in printed for line in expected)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("much"), "OOM"),
        (NotRun("x is not installed"), "NotRun: x is not installed"),
        (ValueError("a line\nanother"), "ValueError: a line"),
    ],
)
def test_attempt_returns_the_error_in_a_line(error, line):
    assert attempt(lambda: 3) == (3, None)
    assert attempt(lambda: _fail(error)) == (None, line)


def test_parts_can_be_selected_and_use_the_whole_budget():
    parts = gpu.parts()
    assert tuple(part.name for part in parts) == tuple(gpu._options([]).parts)
    shares = [part.until for part in parts]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_command_without_a_gpu_ends_with_status_2():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (2, "", 1)
    assert process.stderr.startswith("bench.gpu: needs an NVIDIA GPU")


def test_in_turn_changes_the_first_timer():
    order = []
    timers = [lambda name=name: order.append(name) or len(order) for name in "abc"]
    assert measure.in_turn(timers, fewest=2, most=9, seconds=0) == [[1, 6], [2, 4], [3, 5]]
    assert "".join(order) == "abcbca"
