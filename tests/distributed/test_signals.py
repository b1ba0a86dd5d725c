"""Signals are noted, summed over ranks, and named; a second Ctrl-C stops at once."""

import os
import signal

import pytest

from fasttrain.distributed import signals as interruption
from fasttrain.distributed.signals import ASKING, Signals, asked
from fasttrain.errors import Interrupted


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_each_signal_has_its_count_and_status(tmp_path, number, status):
    number = signal.Signals[number]
    before = signal.getsignal(number)
    with Signals() as signals:
        assert asked(signals.counts) is None
        os.kill(os.getpid(), number)
        assert sum(signals.counts) == 1
        assert asked(signals.counts) is number
    assert signal.getsignal(number) is before
    error = Interrupted(number, 7, tmp_path)
    assert error.status == status
    assert str(error) == f"stopped by {number.name} at step 7; --resume auto --output_dir {tmp_path} goes on"


def test_any_rank_is_enough_and_all_choose_alike():
    assert asked([0, 0, 2]) is signal.SIGUSR1
    assert asked([1, 0, 1]) is signal.SIGTERM
    assert asked([0.0] * len(ASKING)) is None


def test_a_second_ctrl_c_stops_at_once_unless_a_launcher_has_handed_on_the_first(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 0.3
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's, after the terminal's
        assert asked(signals.counts) is signal.SIGINT
        now[0] += 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_signals_twice_are_no_hurry():
    with Signals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.counts[0] == 1
