"""What bench/gpu decides, counts and writes; what it measures needs a GPU."""

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
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def run(tmp_path, clock):
    return Run(tmp_path / "results" / "a.json", {"device": "none"}, Budget(100, clock))


def test_a_part_stops_at_its_share_and_names_what_it_left_out(run, clock):
    def work(run):
        for item in run.in_time(["a", "b", "c", "d"]):
            run.add({"item": item})
            clock.now += 20

    rows = run.start(Part("work", work, str, until=0.4))
    work(run)
    assert [row["item"] for row in rows] == ["a", "b"]
    assert run.finish(None) == ["c", "d"]
    written = json.loads(run.path.read_text())["parts"]["work"]
    assert written == {"rows": rows, "left_out": ["c", "d"], "error": None, "seconds": 40.0}


def test_rows_are_on_disk_before_the_part_ends(run, clock):
    run.start(Part("work", print, str, until=1))
    run.add({"item": 1})
    assert not run.path.exists()
    clock.now += 6
    run.add({"item": 2})
    assert len(json.loads(run.path.read_text())["parts"]["work"]["rows"]) == 2
    assert [path.name for path in run.path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("workers", [0, 2])
def test_work_is_done_side_by_side_and_matched_to_its_item(run, workers):
    run.workers = workers
    assert dict(run.side_by_side(math.sqrt, [1, 4, 9])) == {1: 1.0, 4: 2.0, 9: 3.0}


def test_a_worker_that_dies_is_not_waited_for(run):
    run.workers = 1
    with pytest.raises(WorkerLost, match="in one of: 9"):
        list(run.side_by_side(signal.raise_signal, [9]))


def _ends(run, *parts):
    status = gpu.run_parts(run, list(parts))
    return status, json.loads(run.path.read_text())


def test_what_is_wrong_ends_the_run_and_is_written(run, capsys):
    check = Part("check", lambda run: run.add({"x": 1}), str, 1, lambda rows: [f"x is {rows[0]['x']}"], bool)
    status, content = _ends(run, check, Part("time", print, str, 1))
    assert status == 1
    assert content["failures"] == ["x is 1"]
    assert list(content["parts"]) == ["check"]
    assert "**x is 1**" in capsys.readouterr().out


def test_a_deciding_part_that_breaks_ends_the_run(run, capsys):
    status, content = _ends(run, Part("check", lambda run: 1 / 0, str, 1, None, any), Part("time", print, str, 1))
    assert status == 1
    assert content["failures"] == ["check: ZeroDivisionError: division by zero"]
    assert list(content["parts"]) == ["check"]


def test_a_failure_that_does_not_stop_is_a_failure(run, capsys):
    check = Part("check", lambda run: None, str, 1, lambda rows: ["a little off"], any)
    status, content = _ends(run, check, Part("time", lambda run: None, str, 1))
    assert status == 1
    assert list(content["parts"]) == ["check", "time"]


def test_a_part_that_fails_leaves_its_rows_and_the_other_parts(run, capsys):
    def failing(run):
        run.add({"x": 1})
        raise DeviceLost("gone")

    status, content = _ends(run, Part("one", failing, str, 1), Part("two", lambda run: run.add({"y": 2}), str, 1))
    assert status == 1
    assert content["failures"] == ["one: DeviceLost: gone"]
    assert content["parts"]["one"]["rows"] == [{"x": 1}]
    assert content["parts"]["one"]["error"] == "DeviceLost: gone"
    assert content["parts"]["two"]["rows"] == [{"y": 2}]


def test_a_right_run_ends_with_status_0(run, clock, capsys):
    def slow(run):
        for _ in run.in_time(range(30)):
            clock.now += 50

    status, content = _ends(run, Part("check", slow, str, 1, lambda rows: [], any))
    assert status == 0
    assert content["failures"] == []
    printed = capsys.readouterr().out
    assert "left out, 28:" in printed
    assert "and 18 more" in printed


def test_what_prevents_a_call_is_named():
    def fails(error):
        raise error

    assert attempt(lambda: 3) == (3, None)
    assert attempt(lambda: fails(torch.OutOfMemoryError("much"))) == (None, "OOM")
    assert attempt(lambda: fails(NotRun("x is not installed"))) == (None, "NotRun: x is not installed")
    assert attempt(lambda: fails(ValueError("a line\nanother"))) == (None, "ValueError: a line")


def test_the_report_is_named_after_the_gpu():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu.slug("NVIDIA GeForce RTX 4090 (laptop)") == "nvidia-geforce-rtx-4090-laptop"


def test_nvidia_smi_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu.nvidia_smi(("driver_version",), object()).startswith("no answer: ")


def test_the_digest_follows_the_sources(tmp_path):
    (tmp_path / "a.py").write_text("1")
    before = gpu.sources_digest(tmp_path)
    assert gpu.sources_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("2")
    assert gpu.sources_digest(tmp_path) != before


def test_every_part_can_be_chosen_and_the_last_may_spend_the_budget():
    parts = gpu.parts()
    assert tuple(part.name for part in parts) == tuple(gpu._options([]).parts)
    shares = [part.until for part in parts]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_without_a_gpu_it_says_so_in_a_line_and_ends_with_status_2():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "bench.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("bench/gpu needs an NVIDIA GPU; torch sees none")
    assert done.stderr.count("\n") == 1


def test_who_goes_first_moves_on_and_time_ends_it(monkeypatch):
    order = []
    timers = [lambda name=name: order.append(name) or len(order) for name in "abc"]
    times = measure.in_turn(timers, fewest=2, most=9, seconds=0)
    assert "".join(order) == "abcbca"
    assert times == [[1, 6], [2, 4], [3, 5]]
    assert measure.least_and_median([3.00004, 1.0, 2.0]) == {"min": 1.0, "median": 2.0}
