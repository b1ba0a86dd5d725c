"""The watchdog of one rank. tests/distributed/test_failing_ranks.py has ranks that end each other."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fasttrain.distributed import watchdog
from fasttrain.distributed.watchdog import Watchdog, first_to_end, starting
from fasttrain.distributed.world import World
from fasttrain.errors import Crashed

_ROOT = Path(__file__).parents[2]
_ONE, _TWO = World(0, 1, 0, 1), World(1, 2, 1, 2)
_SCRIPT = """
import ctypes, sys, time
from pathlib import Path
from fasttrain.distributed import watchdog
from fasttrain.distributed.world import World

def hang(holder):
    ctypes.PyDLL(None).sleep(60) if holder == "gil" else time.sleep(60)

watchdog._PERIOD, watchdog._GRACE, watchdog._LINGER, watchdog._GRACE_ALONE = 0.05, 1, 0.2, 1
what, holder, folder = sys.argv[1:]
if what == "start":
    with watchdog.starting(World(0, 2, 0, 2), 0.005):
        hang(holder)
with watchdog.Watchdog(World(0, 1, 0, 1), 0.005) as dog:
    dog.folder = Path(folder) if folder else None
    dog.begin() if what == "begin" else dog.step_done()
    end = time.monotonic() + 2
    while what == "begin" and time.monotonic() < end:
        pass  # works for longer than the limit
    print("hangs", flush=True)
    hang(holder)
"""


def _run(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stderr, [line for line in done.stderr.splitlines() if line.startswith("fasttrain: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["step nothing log", "step gil log", "step nothing stderr", "start gil stderr", "begin nothing log"]
)
def test_a_hang_ends_with_status_1_and_the_stacks(tmp_path, case):
    """A C call that holds the GIL stops every Python thread, and with them the line that names the reason."""
    what, holder, target = case.split()
    log = tmp_path / "rank-0.log"
    status, err, lines = _run("-c", _SCRIPT, what, holder, str(tmp_path) if target == "log" else "")
    stacks = log.read_text() if target == "log" else err
    assert status == 1
    assert "in hang" in stacks
    if holder == "gil":
        assert "in wait" in stacks  # the other threads as well
    else:
        (line,) = lines
        problem = "did nothing at its start" if what == "begin" else "finished no step"
        assert line.startswith(f"fasttrain: rank 0 {problem} for 0.005 minutes (--watchdog_minutes)")
        assert line.endswith(f"in {log}" if target == "log" else "below")


@pytest.mark.slow
def test_a_rank_whose_others_never_start_ends(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    flags = ["--method", "dino", "--watchdog_minutes", "0.01", "--output_dir", str(tmp_path)]
    status, _, (line,) = _run("fasttrain/run.py", *flags, **launched)
    assert status == 1
    assert line.startswith("fasttrain: rank 1 waited 0.01 minutes (--watchdog_minutes)")
    assert f"127.0.0.1:{port}" in line


def test_ranks_that_start_in_time_continue():
    ended = []
    for size, minutes in ((2, 1e-3), (2, 0), (1, 1e-3)):
        with starting(World(0, size, 0, size), minutes, leave=ended.append):
            time.sleep(0.0 if size == 2 and minutes else 0.1)
    time.sleep(0.1)
    assert ended == []


@pytest.fixture
def timer(monkeypatch):
    """The calls of faulthandler's timer: (seconds, file), or None for a cancelled timer. The timer does not run."""
    calls = []

    def later(seconds, *, exit, file):
        assert exit
        calls.append((seconds, file))

    monkeypatch.setattr(watchdog, "_PERIOD", 0.01)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", later)
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: calls.append(None))
    return calls


def _await(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_steps_set_the_timer_again_and_the_end_cancels_it(tmp_path, timer):
    with Watchdog(_ONE, 1) as dog:
        dog.folder = tmp_path
        dog.step_done()
        dog.step_done()  # too soon to set the timer again
        time.sleep(0.02)
        dog.step_done()
        assert [call[0] for call in timer] == [60 + watchdog._GRACE_ALONE] * 2
        assert timer[-1][1].name == str(tmp_path / "rank-0.log")
    assert timer[-1] is None
    assert list(tmp_path.iterdir()) == []  # no empty log


def test_time_in_which_the_process_is_stopped_does_not_count(timer, monkeypatch):
    """Ctrl-Z over lunch ended a run of one rank."""
    clock = iter(range(0, 10**9, 3600))  # every look at the clock is an hour after the one before
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=time.sleep))
    with Watchdog(_ONE, 1, leave=lambda _: pytest.fail("ended")) as dog:
        dog.step_done()
        time.sleep(0.1)
        assert 0 < dog._now < 60


def test_0_minutes_never_set_the_timer(timer):
    with Watchdog(_ONE, 0) as dog:
        dog.step_done()
    assert set(timer) == {None}


def test_a_gone_store_makes_a_rank_the_first_to_end(monkeypatch):
    """After a kill -9 of rank 0, a new connection was retried for the store's timeout, half an hour."""
    serve = "import torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, None, True, wait_for_workers=False)"
    serve = f"{serve}; print(s.port, flush=True); import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True) as holder:
        store = dist.TCPStore("127.0.0.1", int(holder.stdout.readline()), None, False, timeout=timedelta(seconds=300))
        holder.kill()
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    results = []
    thread = threading.Thread(target=lambda: results.append(first_to_end(_TWO)), daemon=True)
    thread.start()
    thread.join(60)
    assert results == [True]


def test_an_unreachable_store_does_not_silence_a_hang(tmp_path, capfd, monkeypatch, timer):
    """The link to the store's machine was cut. A look at the store blocked, and no hang was reported."""
    never = threading.Event()
    silent = SimpleNamespace(check=lambda _: never.wait(), compare_set=lambda *_: never.wait())
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: SimpleNamespace(clone=lambda: silent))
    monkeypatch.setattr(watchdog, "_PATIENCE", 0.1)
    monkeypatch.setattr(watchdog, "_LINGER", 0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    left = []
    with Watchdog(_TWO, 0.001, leave=left.append) as dog:
        dog.folder = tmp_path
        dog.step_done()
        _await(lambda: len(timer) == 2)
        dog.step_done()  # the end is certain now
        assert [call[0] for call in timer] == [0.06 + watchdog._GRACE, watchdog._LINGER]
        dog.crashed(RuntimeError("connection closed"))  # is not reported again
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fasttrain: rank 1 finished no step")
    assert left == [1]


@pytest.mark.parametrize(("end", "status", "logged"), [("1 hang 0", 1, True), ("3 crash 0", 3, False)])
def test_the_end_of_another_rank_ends_this_one(tmp_path, monkeypatch, timer, end, status, logged):
    store = SimpleNamespace(check=lambda _: True, get=lambda _: end.encode())
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: SimpleNamespace(clone=lambda: store))
    left = []
    with Watchdog(_TWO, 1, leave=left.append) as dog:
        dog.folder = tmp_path
        dog.step_done()
        _await(lambda: left)
    assert left == [status]
    assert (tmp_path / "rank-1.log").exists() == logged


def test_a_log_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    """On a disk that became read-only, the removal of the empty log replaced the message that names the disk."""

    def unlink(path, missing_ok=False):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", unlink)
    with Watchdog(_ONE, 30) as dog:
        dog.folder = tmp_path
        dog.step_done()
    assert (tmp_path / "rank-0.log").is_file()


def test_an_error_on_the_only_rank_is_one_line_with_its_log(tmp_path):
    with Watchdog(_ONE, 30) as dog:
        dog.folder = tmp_path
        try:
            raise RuntimeError("it broke\nin many words")
        except RuntimeError as error:
            crashed = dog.crashed(error)
    path = tmp_path / "rank-0.log"
    assert isinstance(crashed, Crashed)
    assert str(crashed) == f"rank 0 failed: RuntimeError: it broke; its traceback is in {path}"
    assert "Traceback (most recent call last)" in path.read_text()
    assert "in many words" in path.read_text()
