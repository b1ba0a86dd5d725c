"""Monitors of collapse and of loss spikes, and the paper's binary test on real digits (arXiv 2307.10907, figure 2).

The binary test trains DINO without centring, base and twin; ``bench/evidence/collapse.py`` is its full length.
"""

import json
import random

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.run import main
from fasttrain.training.monitors import CollapseMonitor, SpikeMonitor, collapse_sign, describe_spike, spread

_WITHOUT_CENTRING = "--method dino --no_centering --out_dim 256 --use_bn_at_bottleneck false --momentum_teacher 0.9"
_WITHOUT_CENTRING += " --warmup_epochs 1 --epochs 3"
_HEALTHY = {
    "step": 1000,
    "entropy": 5.0,
    "information": 3.0,
    "deficit": 2.0,
    "channel_std": 0.9,
    "effective_rank": 20.0,
}


def test_spread_of_uniform_rows_is_one_with_full_rank():
    rows = normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    measured = spread(rows)
    assert measured["channel_std"] == pytest.approx(1, abs=0.02)
    assert measured["effective_rank"] == pytest.approx(16, abs=0.2)


def test_spread_of_equal_rows_is_zero():
    measured = spread(normalize(torch.ones(50, 8), dim=1))
    assert measured["channel_std"] == pytest.approx(0, abs=1e-6)
    assert measured["effective_rank"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channel_std": 0.05}, "one point"),
        ({"effective_rank": 1.2}, "one line"),
        ({"information": 0.01, "entropy": 0.02, "deficit": 7.6}, "same assignment"),
        ({"information": -0.01, "deficit": 0.01}, "uniform"),
    ],
)
def test_each_kind_of_collapse_has_its_sign(change, words):
    assert words in collapse_sign({**_HEALTHY, **change})
    assert collapse_sign(_HEALTHY) is None


def test_collapse_is_reported_once_and_counts_when_it_persists():
    monitor = CollapseMonitor(steps_per_epoch=100)
    bad = {**_HEALTHY, "channel_std": 0.01}
    assert [bool(monitor.observe(bad)) for _ in range(5)] == [False, False, True, False, False]
    assert monitor.collapsed
    assert not monitor.final
    for _ in range(5):
        monitor.observe(bad)
    assert monitor.final
    monitor.observe(_HEALTHY)
    assert not monitor.collapsed


def test_start_of_a_run_is_not_judged():
    monitor = CollapseMonitor(steps_per_epoch=5000)
    bad = {**_HEALTHY, "channel_std": 0.01}
    for step in (10, 200, 500):
        monitor.observe({**bad, "step": step})
    assert monitor.consecutive == 0
    uniform = {**_HEALTHY, "information": 0.0, "deficit": 0.0}
    monitor.observe({**uniform, "step": 4000})
    assert monitor.consecutive == 0
    monitor.observe({**uniform, "step": 5001})
    assert monitor.consecutive == 1


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """The summaries of base and twin, trained with the same flags."""
    results = []
    for twin in ([], ["--entropy"]):
        folder = tmp_path_factory.mktemp("run")
        assert main([*_WITHOUT_CENTRING.split(), *twin, "--output_dir", str(folder)]) == 0
        results.append(json.loads((folder / "summary.json").read_text()))
    return results


@pytest.mark.slow
def test_dino_without_centring_collapses(summaries):
    base, _ = summaries
    assert base["entropy"] < 0.2 * base["entropy_max"]
    assert base["knn_top1"] < base["knn_top1_untrained"]


@pytest.mark.slow
def test_twin_without_centring_keeps_its_entropy_and_learns(summaries):
    base, twin = summaries
    assert twin["entropy"] > 0.8 * twin["entropy_max"]
    assert twin["information"] > base["information"] + 1
    assert twin["knn_top1"] > max(twin["knn_top1_untrained"] + 0.01, base["knn_top1"] + 0.05)
    assert not twin["collapsed"]


def _losses(count, slope=-0.01, noise=0.05):
    draw = random.Random(0)
    return [5 + slope * step + draw.gauss(0, noise) for step in range(count)]


@pytest.mark.parametrize("slope", [-0.01, 0.0, 0.01])
def test_noise_and_slow_trends_are_no_spikes(slope):
    spikes = SpikeMonitor()
    assert [loss for loss in _losses(1000, slope) if spikes.observe(loss)] == []


def test_jump_is_reported_once_with_its_size():
    spikes = SpikeMonitor()
    for loss in _losses(50, slope=0):
        spikes.observe(loss)
    spike = spikes.observe(7.0)
    assert spike.median == pytest.approx(5, abs=0.05)
    assert spike.deviations == pytest.approx(2 / 0.05, rel=0.4)  # of the noise's standard deviation
    assert spike.steps == 50
    assert all(spikes.observe(7.0) is None for _ in range(200))


def test_later_jump_is_reported_again():
    spikes = SpikeMonitor()
    reported = []
    for step, loss in enumerate(_losses(400, slope=0)):
        if spikes.observe(loss + 3 * (step in (50, 60, 250))):
            reported.append(step)
    assert reported == [50, 250]


def test_fall_and_start_are_no_spikes():
    spikes = SpikeMonitor()
    assert not any(spikes.observe(loss) for loss in [1.0, 50.0, 1.0, 60.0])
    spikes = SpikeMonitor()
    assert not any(spikes.observe(loss) for loss in [5.0] * 50 + [1.0] * 10)


def test_constant_loss_has_a_minimal_deviation():
    spikes = SpikeMonitor()
    assert not any(spikes.observe(loss) for loss in [5.0] * 50 + [5.2])
    assert spikes.observe(5.5)
    spikes = SpikeMonitor()
    assert not any(spikes.observe(loss) for loss in [0.0] * 50)
    assert spikes.observe(1e-3)


def test_spike_line_has_the_terms_of_the_step_or_the_last_log():
    spikes = SpikeMonitor()
    for loss in _losses(50, slope=0):
        spikes.observe(loss)
    spike = spikes.observe(7.0)
    logged = {"step": 40, "entropy": 5.0, "reconstruction": 1.0}
    line = describe_spike(spike, 51, {"loss": 7.0}, logged)
    assert line.startswith("step 51: ")
    assert "entropy 5.000, reconstruction 1.000 (of step 40)" in line
    line = describe_spike(spike, 51, {"loss": 7.0, "entropy": 4.0, "reconstruction": 2.0}, logged)
    assert "entropy 4.000, reconstruction 2.000" in line
    assert "of step 40" not in line
