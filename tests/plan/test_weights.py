"""Weights as ZeRO sees them, and what stage 3 fetches and when."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttrain.plan.weights import Zero, _windows, flat_groups, gathers, weights_of, zero_of

from .small import built, configured, weight

STAGE_3 = Zero(3, world=2, bucket=1000, overlap=True, offload=False, persistent=10, reuse=10**6, prefetch=1, live=0)


def test_every_weight_has_its_owner_and_its_width():
    config = configured("mocov3", arch="vit_tiny", patch_size=8)
    method = built(config)
    weights = {w.name: w for w in weights_of(method, config.train, "bf16")}
    assert list(weights) == [name for name, _ in method.named_parameters()]
    assert weights["teacher.backbone.blocks.0.attn.qkv.weight"].teacher
    assert weights["student.backbone.pos_embed"].group is None  # fixed
    assert weights["student.backbone.blocks.0.attn.qkv.weight"].group == "weight matrices"
    assert weights["student.backbone.blocks.0.attn.qkv.bias"].group == "biases and norms"
    assert weights["student.backbone.blocks.0.attn.qkv.bias"].sent == 2
    assert weights["student.backbone.blocks.0.norm1.weight"].sent == 4
    assert {w.sent for w in weights_of(method, config.train, "fp32")} == {4}


def test_deepspeed_is_asked_for_what_the_engine_asks_it():
    weights = (weight(800), weight(80))
    zero = zero_of(configured("simclr").train, 3, 4, "bf16", weights)
    assert (zero.stage, zero.world, zero.overlap, zero.persistent) == (3, 4, True, 100_000)
    assert zero.bucket == 110  # several, for one to be sent beside the products that fill the next
    zero = zero_of(configured("simclr").train, 2, 4, "bf16", weights)
    assert (zero.overlap, zero.offload, zero.bucket) == (False, False, 880)
    more = configured("simclr", overlap_comm=True, offload_optimizer=True).train
    assert [(z.overlap, z.offload) for z in (zero_of(more, s, 4, "bf16", weights) for s in (1, 2, 3))] == 3 * [
        (True, True)
    ]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8))
def test_flat_parts_hold_everything_and_begin_at_even_elements(sizes, world):
    weights = [weight(n, group=("a", "b")[i % 2], name=str(i)) for i, n in enumerate(sizes)]
    groups = flat_groups(weights, world)
    assert sorted(w.name for members, _ in groups for w in members) == sorted(w.name for w in weights)
    for members, part in groups:
        whole = sum(w.numel for w in members)
        assert part % 2 == 0
        assert whole <= part * world < whole + 2 * world


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 40))
def test_windows_reach_as_far_as_deepspeed_looks(sizes, reach):
    def looked_at(start):  # PartitionedParameterCoordinator.__params_to_release
        traversed, end = 0, start + 1
        for size in sizes[start + 1 :]:
            if traversed >= reach:
                break
            traversed, end = traversed + size, end + 1
        return end

    assert _windows(sizes, reach) == [looked_at(start) for start in range(len(sizes))]


_WEIGHTS = [weight(1001, name="a"), weight(500, name="b", sent=2), weight(10, name="small")]
_USES = [("a", "small"), ("b",), ("b",), ("a", "small")]


def test_near_weights_are_fetched_once_and_stay():
    found = gathers(_WEIGHTS, _USES, STAGE_3)
    assert found.bytes == 4 * 1002 + 2 * 500  # padded for two ranks; small ones are whole anyway
    assert found.peak == 4 * (1002 + 500)


def test_far_weights_are_fetched_again_for_every_use():
    zero = Zero(3, world=2, bucket=1000, overlap=True, offload=False, persistent=10, reuse=1, prefetch=1, live=0)
    found = gathers(_WEIGHTS, _USES, zero)
    assert found.bytes == 2 * 4 * 1002 + 2 * 500  # b follows itself
    assert found.peak == 4 * 1002


def test_as_much_as_may_live_is_fetched_ahead():
    zero = Zero(3, world=2, bucket=1000, overlap=True, offload=False, persistent=10, reuse=1, prefetch=100, live=1200)
    found = gathers(_WEIGHTS, _USES, zero)
    assert found.peak == 4 * 1200
    assert found.messages == 26  # of 100 elements
    assert found.buffer == -(-found.bytes // 26)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_nothing_is_fetched(stage):
    zero = Zero(
        stage, world=2, bucket=1000, overlap=True, offload=False, persistent=10, reuse=1, prefetch=100, live=1200
    )
    assert gathers(_WEIGHTS, _USES, zero) == type(gathers(_WEIGHTS, _USES, zero))(0, 0, 0, 0)


def test_uses_name_weights_that_there_are():
    from fasttrain.plan.trace import trace

    config = configured("dino", arch="conv_small")
    method = built(config)
    weights = weights_of(method, config.train, "fp32")
    traced = trace(method, config.views, 8, precision="fp32", world=1)
    used = {name for names in traced.uses for name in names}
    assert used <= {w.name for w in weights}
    assert {w.name for w in weights if w.numel > 1000} <= used
    assert torch.tensor(gathers(weights, traced.uses, zero_of(config.train, 3, 2, "fp32", weights)).bytes) > 0
