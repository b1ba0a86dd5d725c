"""Signals are recorded, summed over ranks and named. A second Ctrl-C stops at once."""

import os
import signal

import pytest

from fasttrain.distributed import signals as signals_module
from fasttrain.distributed.signals import STOPPING, Signals, stop_signal
from fasttrain.errors import Interrupted


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
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
    assert stop_signal([0, 0, 2]) is signal.SIGUSR1
    assert stop_signal([1, 0, 1]) is signal.SIGTERM
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
