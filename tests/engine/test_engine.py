"""Schedules and seeds of the engine's steps."""

from types import SimpleNamespace

import pytest

from fasttrain.config.settings import TrainConfig
from fasttrain.engine.engine import Engine
from fasttrain.engine.seeds import seed_of
from fasttrain.methods.base import Step
from fasttrain.optim.schedules import scaled_lr
from tests.checkpoints import small_engine, train


def test_learning_rate_falls_to_a_tenth_at_each_drop():
    """CMC's schedule: a linear warm-up, then constant until the drops, without a cosine."""
    method = SimpleNamespace(momentum=lambda step: None)
    settings = TrainConfig(lr_drops=(2.0, 3.0), warmup_epochs=0.5)
    run = SimpleNamespace(train=settings, steps_per_epoch=4, total_steps=16, peak_lr=0.4, method=method)
    rates = [Engine.schedules(run, Step(index, 16, 4))["lr"] for index in range(16)]
    assert rates == pytest.approx([0.2, *[0.4] * 7, *[0.04] * 4, *[0.004] * 4])


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 0.2), ("sqrt", 0.05)])
def test_constant_rate_stays_at_its_scaled_peak(scaling, peak):
    """DINOv3's schedule, and DINOv2's scaling: the rate for 1,024 images times the root of the batch."""
    method = SimpleNamespace(momentum=lambda step: None)
    settings = TrainConfig(constant_lr=True, warmup_epochs=0.5)
    rate = scaled_lr(0.1, scaling, {"linear": 512, "sqrt": 256}[scaling])
    run = SimpleNamespace(train=settings, steps_per_epoch=4, total_steps=16, peak_lr=rate, method=method)
    rates = [Engine.schedules(run, Step(index, 16, 4))["lr"] for index in range(16)]
    assert rates == pytest.approx([peak / 2, *[peak] * 15])


def test_groups_follow_the_schedules_unless_frozen():
    small = {"hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 32}
    with small_engine("dino", freeze_last_layer=1, warmup_epochs=0, **small) as engine:
        rates = []
        for index in (0, 4):
            train(engine, [index])
            rates.append({g["name"]: (g["lr"], g["weight_decay"]) for g in engine.optimizer.param_groups})
            now = engine.schedules(engine.step_at(index, measure=False))
            assert rates[-1]["weight matrices"] == (now["lr"], now["weight_decay"])
            assert rates[-1]["biases and norms"] == (now["lr"], 0.0)
    assert [r["prototypes"][0] for r in rates] == [0.0, rates[1]["weight matrices"][0]]


def test_seed_is_a_pinned_hash_of_its_numbers():
    """Another version of Python must resume to the same draws. The key is the one of a view's parameters."""
    assert [seed_of(7, 3), seed_of(7, 3, 0), seed_of(3, 7)] == [
        2119459165173752117,
        7540872857687984366,
        5972284703415392402,
    ]
    seeds = [seed_of(7, epoch) for epoch in range(1000)]
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert len(set(seeds)) == 1000
