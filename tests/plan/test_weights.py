"""Weights as ZeRO sees them, and the weights that stage 3 fetches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.plan.trace import trace
from fasttrain.plan.weights import Gathers, _windows, flat_groups, gathers, weights_of, zero_of

from .small import built, configured, weight, zero


def test_weights_have_group_and_precision():
    config = configured("mocov3", arch="vit_tiny", patch_size=8)
    method = built(config)
    weights = {w.name: w for w in weights_of(method, config.train, "bf16")}
    assert list(weights) == [name for name, _ in method.named_parameters()]
    assert weights["teacher.backbone.blocks.0.attn.qkv.weight"].teacher
    student = "student.backbone."
    for name, group, sent in (
        ("pos_embed", None, 4),  # not trained
        ("blocks.0.attn.qkv.weight", "weight matrices", 2),
        ("blocks.0.attn.qkv.bias", "biases and norms", 2),
        ("blocks.0.norm1.weight", "biases and norms", 4),
    ):
        assert (weights[student + name].group, weights[student + name].sent) == (group, sent)
    assert {w.sent for w in weights_of(method, config.train, "fp32")} == {4}


def test_zero_has_the_engine_s_settings():
    weights, train = (weight(800), weight(80)), configured("simclr").train
    settings = zero_of(train, 3, 4, "bf16", weights)
    assert (settings.stage, settings.world, settings.overlap, settings.persistent) == (3, 4, True, 100_000)
    assert settings.bucket == 110  # several buckets, so that sending one overlaps with filling the next
    settings = zero_of(train, 2, 4, "bf16", weights)
    assert (settings.overlap, settings.offload, settings.bucket) == (True, False, 110)
    train = configured("simclr", overlap_comm=True, offload_optimizer=True).train
    for stage in (1, 2, 3):
        settings = zero_of(train, stage, 4, "bf16", weights)
        assert (settings.overlap, settings.offload) == (True, True)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_flat_groups_hold_all_weights_in_even_parts(sizes, world):
    weights = [weight(n, group=("a", "b")[i % 2], name=str(i)) for i, n in enumerate(sizes)]
    groups = flat_groups(weights, world)
    assert sorted(w.name for members, _ in groups for w in members) == sorted(w.name for w in weights)
    for members, part in groups:
        assert part % 2 == 0
        assert 0 <= part * world - sum(w.numel for w in members) < 2 * world


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 40))
def test_windows_match_deepspeed_s_search(sizes, reach):
    def expected(start):  # PartitionedParameterCoordinator.__params_to_release
        traversed, end = 0, start + 1
        for size in sizes[start + 1 :]:
            if traversed >= reach:
                break
            traversed, end = traversed + size, end + 1
        return end

    assert _windows(sizes, reach) == [expected(start) for start in range(len(sizes))]


_WEIGHTS = [weight(1001, name="a"), weight(500, name="b", sent=2), weight(10, name="small")]
_USES = [("a", "small"), ("b",), ("b",), ("a", "small")]


@pytest.mark.parametrize(
    ("options", "size", "peak"),
    [
        ({}, 4 * 1002 + 2 * 500, 4 * (1002 + 500)),  # padded for two ranks; the small weight is not sharded
        ({"reuse": 1}, 2 * 4 * 1002 + 2 * 500, 4 * 1002),  # "a" is fetched twice, "b" is used again at once
        ({"reuse": 1, "live": 1200}, 2 * 4 * 1002 + 2 * 500, 4 * 1200),
    ],
)
def test_gathers_refetch_beyond_reuse_and_prefetch_to_live(options, size, peak):
    fetched = gathers(_WEIGHTS, _USES, zero(3, world=2, **options))
    messages = -(-(1002 * (1 + ("reuse" in options)) + 500) // 100)
    assert fetched == Gathers(size, messages, peak, -(-size // messages))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gathers_below_stage_3_are_empty(stage):
    assert gathers(_WEIGHTS, _USES, zero(stage, world=2, live=1200)) == Gathers(0, 0, 0, 0)


def test_gathers_use_the_names_of_a_trace():
    config = configured("dino", arch="conv_small")
    method = built(config)
    weights = weights_of(method, config.train, "fp32")
    uses = trace(method, config.views, 8, precision="fp32", world=1).uses
    used = {name for names in uses for name in names}
    assert {w.name for w in weights if w.numel > 1000} <= used <= {w.name for w in weights}
    assert gathers(weights, uses, zero_of(config.train, 3, 2, "fp32", weights)).bytes > 0
