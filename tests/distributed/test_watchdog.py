"""The watchdog of one rank; how ranks bring each other down is in test_failing_ranks.py."""

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
from fasttrain.distributed.watchdog import Watchdog
from fasttrain.distributed.world import World
from fasttrain.errors import Crashed

_ROOT = Path(__file__).parents[2]

_ONE = World(0, 1, 0, 1)
_SECOND = 1 / 60


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(watchdog, "_PERIOD", 0.01)


class _Left:
    """In place of ``os._exit``: what it was called with, and when."""

    def __init__(self):
        self.status, self.happened = None, threading.Event()

    def __call__(self, status):
        self.status = status
        self.happened.set()


def _hang_in_here(left):
    assert left.happened.wait(30)


def test_a_hang_leaves_the_stacks_of_all_threads_one_line_and_status_1(tmp_path, capsys):
    left = _Left()
    with Watchdog(_ONE, 0.2 * _SECOND, leave=left) as dog:
        dog.folder = tmp_path
        dog.step_done()
        _hang_in_here(left)
    assert left.status == 1
    log = (tmp_path / "rank-0.log").read_text()
    assert "in _hang_in_here" in log
    assert "in _watch" in log  # the other threads too
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: rank 0 finished no step for 0.00333333 minutes (--watchdog_minutes); ")
    assert line.endswith(f"the stacks of all threads are in {tmp_path / 'rank-0.log'}")


def test_without_a_folder_the_stacks_go_to_stderr(capfd):
    left = _Left()
    with Watchdog(_ONE, 0.1 * _SECOND, leave=left) as dog:
        dog.step_done()
        _hang_in_here(left)
    err = capfd.readouterr().err
    assert "in _hang_in_here" in err
    assert err.endswith("the stacks of all threads are above\n")


def test_a_rank_whose_others_never_start_says_so_and_ends(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given = ["--method", "dino", "--watchdog_minutes", "0.01", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "fasttrain/run.py", *given],
        env=os.environ | alone,
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("fasttrain: ")]
    where = f"rank 1 waited 0.01 minutes (--watchdog_minutes) at 127.0.0.1:{port} for all 2 ranks to start"
    assert said == [f"fasttrain: {where}; look at what the others say, then start all of them"]


def test_ranks_that_start_in_time_are_left_alone():
    ended = []
    for size, minutes in ((2, 1e-3), (2, 0), (1, 1e-3)):
        with watchdog.starting(World(0, 0, size, size), minutes, leave=ended.append):
            time.sleep(0.0 if size == 2 and minutes else 0.2)
    time.sleep(0.2)
    assert ended == []


def test_steps_and_long_work_between_them_are_no_hang():
    left = _Left()
    with Watchdog(_ONE, 0.5 * _SECOND, leave=left) as dog:
        time.sleep(0.7)  # before the first step
        dog.step_done()
        for _ in range(10):
            time.sleep(0.1)
            dog.step_done()
        with dog.suspended():
            time.sleep(0.7)
        time.sleep(0.1)
    assert left.status is None


def test_0_minutes_never_end_a_run():
    left = _Left()
    with Watchdog(_ONE, 0, leave=left) as dog:
        dog.step_done()
        time.sleep(0.2)
    assert left.status is None


def test_where_the_rank_that_held_the_store_is_gone_a_rank_ends_at_once(monkeypatch):
    """A new connection was tried for as long as the store's timeout, half an hour, after a kill -9 of rank 0."""
    serve = "import torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, None, True, wait_for_workers=False)"
    serve = f"{serve}; print(s.port, flush=True); import time; time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True) as holder:
        port = int(holder.stdout.readline())
        store = dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=300))
        holder.kill()
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(watchdog.first_to_end(World(1, 2, 1, 2))), daemon=True)
    thread.start()
    thread.join(60)
    assert ended == [True]


def test_a_store_that_cannot_be_reached_keeps_no_rank(tmp_path, capsys, monkeypatch):
    """The link to the first rank's machine was cut: a look at the store did not come back, and no hang was seen."""
    never = threading.Event()
    silent = SimpleNamespace(check=lambda _: never.wait(), compare_set=lambda *_: never.wait())
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: SimpleNamespace(clone=lambda: silent))
    monkeypatch.setattr(watchdog, "_PATIENCE", 0.1)
    monkeypatch.setattr(watchdog, "_LINGER", 0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    left = _Left()
    with Watchdog(World(1, 2, 1, 2), 0.1 * _SECOND, leave=left) as dog:
        dog.folder = tmp_path
        dog.step_done()
        _hang_in_here(left)
    assert left.status == 1
    assert capsys.readouterr().err.startswith("fasttrain: rank 1 finished no step")


def test_a_rank_that_nobody_hears_says_once_why_it_ends(tmp_path, capsys, monkeypatch):
    """Stopped and continued after the others were gone, it told of a hang and of the connection that it had lost."""
    monkeypatch.setattr(watchdog, "first_to_end", lambda *_, **__: True)  # as where the store is gone
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: SimpleNamespace(clone=lambda: None))
    left = _Left()
    with Watchdog(World(1, 2, 1, 2), 0.1 * _SECOND, leave=left) as dog:
        dog.folder = tmp_path
        dog.step_done()
        _hang_in_here(left)
        dog.crashed(RuntimeError("connection closed"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: rank 1 finished no step")


def test_an_error_on_the_only_rank_is_told_and_its_traceback_kept(tmp_path):
    left = _Left()
    with Watchdog(_ONE, 30, leave=left) as dog:
        dog.folder = tmp_path
        try:
            raise RuntimeError("it broke\nin many words")
        except RuntimeError as error:
            crashed = dog.crashed(error)
    assert isinstance(crashed, Crashed)
    path = tmp_path / "rank-0.log"
    assert str(crashed) == f"rank 0 failed: RuntimeError: it broke; its traceback is in {path}"
    assert "in many words" in path.read_text()
    assert "Traceback (most recent call last)" in path.read_text()
    assert left.status is None
