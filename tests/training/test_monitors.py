"""Collapse is noticed; and the paper's binary test on real digits (arXiv 2307.10907, figure 2): DINO without centring,
base and twin, of which ``bench/evidence/collapse.py`` is the full length.
"""

import json
import math

import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.run import main
from fasttrain.training.monitors import Watch, sign, spread

_WITHOUT_CENTRING = "--method dino --no_centering --out_dim 256 --use_bn_at_bottleneck false --momentum_teacher 0.9"
_WITHOUT_CENTRING += " --warmup_epochs 1 --epochs 3 --knn_every 0"
_HEALTHY = {
    "step": 1000,
    "entropy": 5.0,
    "information": 3.0,
    "deficit": 2.0,
    "channel_std": 0.9,
    "effective_rank": 20.0,
}


def test_uniform_rows_have_a_spread_of_one_and_full_rank():
    rows = normalize(torch.randn(2000, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    found = spread(rows)
    assert found["channel_std"] == pytest.approx(1, abs=0.02)
    assert found["effective_rank"] == pytest.approx(16, abs=0.2)


def test_equal_rows_have_none():
    found = spread(normalize(torch.ones(50, 8), dim=1))
    assert found["channel_std"] == pytest.approx(0, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_rows_that_are_no_numbers_do_not_break_the_monitor():
    assert math.isnan(spread(torch.full((4, 3), math.nan))["effective_rank"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channel_std": 0.05}, "one point"),
        ({"effective_rank": 1.2}, "one line"),
        ({"information": 0.01, "entropy": 0.02, "deficit": 7.6}, "assigned alike"),
        ({"information": -0.01, "deficit": 0.01}, "uniform"),
    ],
)
def test_each_kind_of_collapse_has_its_sign(change, words):
    assert words in sign({**_HEALTHY, **change})
    assert sign(_HEALTHY) is None


def test_a_sign_is_told_once_and_counts_when_it_has_stayed():
    watch = Watch(steps_per_epoch=100)
    bad = {**_HEALTHY, "channel_std": 0.01}
    assert [bool(watch.look(bad)) for _ in range(5)] == [False, False, True, False, False]
    assert watch.collapsed
    assert not watch.hopeless
    for _ in range(5):
        watch.look(bad)
    assert watch.hopeless
    watch.look(_HEALTHY)
    assert not watch.collapsed


def test_the_start_is_not_judged():
    watch = Watch(steps_per_epoch=5000)
    bad = {**_HEALTHY, "channel_std": 0.01}
    for step in (10, 200, 500):
        watch.look({**bad, "step": step})
    assert watch.seen == 0
    uniform = {**_HEALTHY, "information": 0.0, "deficit": 0.0}
    watch.look({**uniform, "step": 4000})
    assert watch.seen == 0
    watch.look({**uniform, "step": 5001})
    assert watch.seen == 1


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """What base and twin reach with the same flags."""
    found = []
    for twin in ([], ["--entropy"]):
        folder = tmp_path_factory.mktemp("run")
        assert main([*_WITHOUT_CENTRING.split(), *twin, "--output_dir", str(folder)]) == 0
        found.append(json.loads((folder / "summary.json").read_text()))
    return found


def test_without_centring_dino_forgets_what_an_untrained_network_knows(summaries):
    base, _ = summaries
    assert base["entropy"] < 0.2 * base["entropy_max"]
    assert base["knn_top1"] < base["knn_top1_untrained"]


def test_without_centring_its_twin_keeps_its_entropy_and_learns(summaries):
    base, twin = summaries
    assert twin["entropy"] > 0.8 * twin["entropy_max"]
    assert twin["information"] > base["information"] + 1
    assert twin["knn_top1"] > max(twin["knn_top1_untrained"] + 0.01, base["knn_top1"] + 0.05)
    assert not twin["collapsed"]
