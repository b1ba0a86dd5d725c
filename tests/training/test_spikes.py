"""Loss spikes: told once, with what is beside them; noise and trends are none."""

import random

import pytest

from fasttrain.training.monitors import Spikes, told


def _losses(count, slope=-0.01, noise=0.05):
    draw = random.Random(0)
    return [5 + slope * step + draw.gauss(0, noise) for step in range(count)]


@pytest.mark.parametrize("slope", [-0.01, 0.0, 0.01])
def test_noise_and_slow_trends_are_no_spikes(slope):
    spikes = Spikes()
    assert [loss for loss in _losses(1000, slope) if spikes.look(loss)] == []


def test_a_jump_is_told_once_with_its_size():
    spikes = Spikes()
    for loss in _losses(50, slope=0):
        spikes.look(loss)
    spike = spikes.look(7.0)
    assert spike.usual == pytest.approx(5, abs=0.05)
    assert spike.deviations == pytest.approx(2 / 0.05, rel=0.4)  # of the noise's standard deviation
    assert spike.steps == 50
    assert all(spikes.look(7.0) is None for _ in range(200))


def test_a_later_jump_is_told_again():
    spikes = Spikes()
    told_at = []
    for step, loss in enumerate(_losses(400, slope=0)):
        if spikes.look(loss + 3 * (step in (50, 60, 250))):
            told_at.append(step)
    assert told_at == [50, 250]


def test_a_fall_is_none_and_so_is_the_start():
    spikes = Spikes()
    assert not any(spikes.look(loss) for loss in [1.0, 50.0, 1.0, 60.0])
    spikes = Spikes()
    assert not any(spikes.look(loss) for loss in [5.0] * 50 + [1.0] * 10)


def test_a_loss_that_never_moved_has_a_floor():
    spikes = Spikes()
    assert not any(spikes.look(loss) for loss in [5.0] * 50 + [5.2])
    assert spikes.look(5.5)
    spikes = Spikes()
    assert not any(spikes.look(loss) for loss in [0.0] * 50)
    assert spikes.look(1e-3)


def test_the_line_has_entropy_and_reconstruction_of_the_step_or_of_the_last_logged_one():
    spikes = Spikes()
    for loss in _losses(50, slope=0):
        spikes.look(loss)
    spike = spikes.look(7.0)
    logged = {"step": 40, "entropy": 5.0, "reconstruction": 1.0}
    line = told(spike, 51, {"loss": 7.0}, logged)
    assert line.startswith("step 51: the loss jumped to 7, ")
    assert line.endswith("the median of the last 50 steps; entropy 5.000, reconstruction 1.000 (of step 40)")
    line = told(spike, 51, {"loss": 7.0, "entropy": 4.0, "reconstruction": 2.0}, logged)
    assert line.endswith("; entropy 4.000, reconstruction 2.000")
