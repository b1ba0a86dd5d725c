"""Signals are recorded, summed over ranks and named. A second Ctrl-C stops at once."""

import os
import signal
import threading

import pytest

from fasttrain.distributed import signals as signals_module
from fasttrain.distributed.signals import STOPPING, Signals, Stopped, stop_signal
from fasttrain.errors import Interrupted


@pytest.mark.parametrize(
    ("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138), ("SIGUSR2", 140), ("SIGHUP", 129)]
)
def test_each_signal_is_counted_once_and_has_its_status(tmp_path, name, status):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with Signals() as signals:
        assert stop_signal(signals.counts) is None
        for _ in range(1 if name == "SIGINT" else 2):
            os.kill(os.getpid(), number)
        assert sum(signals.counts) == 1
        assert stop_signal(signals.counts) is number
    assert signal.getsignal(number) is before
    error = Interrupted(number, 7, tmp_path)
    assert error.status == status
    assert {name, "7", str(tmp_path)} <= set(str(error).replace(";", "").split())


def test_all_ranks_choose_the_same_signal():
    assert stop_signal([0, 0, 2, 0, 0]) is signal.SIGUSR1
    assert stop_signal([1, 0, 1, 0, 0]) is signal.SIGTERM
    assert stop_signal([0.0] * len(STOPPING)) is None


def test_a_second_ctrl_c_a_second_later_raises(monkeypatch):
    """Within the second it may be the first one, which a launcher forwards to ranks that had it from the terminal."""
    now = [100.0]
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: now[0])
    with Signals() as signals:
        for wait in (0, 0.3):
            now[0] += wait
            os.kill(os.getpid(), signal.SIGINT)
        assert stop_signal(signals.counts) is signal.SIGINT
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("early", [True, False])
def test_raising_ends_work_at_any_signal(early):
    with Signals() as signals, pytest.raises(Stopped) as error:  # noqa: PT012
        if early:
            signal.raise_signal(signal.SIGUSR2)
        with signals.raising():
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the work continued")
    assert error.value.number is (signal.SIGUSR2 if early else signal.SIGTERM)


def test_signals_in_another_thread_change_no_handler():
    """``fasttrain.train`` in a thread ended with a ValueError of the signal module."""
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run():
        with Signals() as signals:
            seen.append((signals.counts, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [([0.0] * len(STOPPING), before)]


def test_nohup_keeps_a_run_alive_when_its_terminal_closes():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert stop_signal(signals.counts) is None
    finally:
        signal.signal(signal.SIGHUP, before)
