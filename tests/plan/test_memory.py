"""Bytes by what they are for, at every stage; bench/tests/test_plan_check.py holds them to what DeepSpeed holds."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fasttrain.plan.memory import Part, between_epochs, gradient_bytes, largest_batch, parts, shard_elements, total
from fasttrain.plan.trace import Trace
from fasttrain.plan.update import Update
from fasttrain.plan.weights import Zero, flat_groups

from .small import configured, weight

_WEIGHTS = (weight(1000), weight(200), weight(8, "no_decay"), weight(1000, None, teacher=True, name="t"))
_TRACE = Trace(4, 1000, 100, 50, 70, 30, (), (), ())
_UPDATE = Update(state=2 * 4 * 1208, temporary=4 * 1208, moved=0, teacher_moved=0, messages=())


def _zero(stage, world=4, bucket=10_000, overlap=False, offload=False):
    return Zero(
        stage, world, bucket, overlap=overlap, offload=offload, persistent=10, reuse=10**6, prefetch=100, live=0
    )


def _parts(stage, **options):
    return {p.name: p for p in parts(_WEIGHTS, 77, _TRACE, _UPDATE, _zero(stage), **options)}


def test_stage_0_holds_everything_whole():
    found = _parts(0)
    held = {name: part.backward for name, part in found.items()}
    assert held["parameters"] == held["gradients"] == 4 * 1208
    assert held["teacher"] == 4 * 1000
    assert held["optimizer"] == 8 * 1208
    assert (held["activations"], held["loss"], held["buffers"]) == (1000, 100, 77)
    assert held["views"] == 3 * 30  # one in hand, two ahead
    assert held["ZeRO's buckets"] == 0
    assert found["temporary"].backward == 70
    assert found["temporary"].update == 4 * 1208  # a bucket is copied to be sent, or the optimizer's own
    assert found["activations"].update == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_shard_the_optimizer_and_set_buckets_aside(stage):
    held = {name: part.backward for name, part in _parts(stage).items()}
    assert held["parameters"] == 4 * 1208
    shard = 300 + 2
    assert shard_elements(_WEIGHTS, _zero(stage)) == shard
    assert held["optimizer"] == 12 * shard  # master weights too
    assert held["gradients"] == (4 * 1208 if stage == 1 else 4 * (1000 + 200 + 8))
    assert held["ZeRO's buckets"] == 4 * 10_000 + (0 if stage == 1 else 4 * 1208)


def test_stage_3_shards_all_but_small_weights():
    held = {name: part.backward for name, part in _parts(3).items()}
    assert held["parameters"] == 4 * (250 + 50 + 2 + 8)  # the small one both ways
    assert held["teacher"] == 4 * 250
    assert held["optimizer"] == 8 * 302  # it steps the shards themselves
    assert held["gradients"] == 4 * 302


def test_a_bucket_for_every_precision_that_is_sent():
    low = (weight(1000, sent=2), weight(200))
    held = {p.name: p.update for p in parts(low, 0, _TRACE, _UPDATE, _zero(1))}
    assert held["ZeRO's buckets"] == 2 * 4 * 10_000
    held = {p.name: p.update for p in parts(low, 0, _TRACE, _UPDATE, _zero(3))}
    assert held["ZeRO's buckets"] == (4 + 2) * 10_000


def test_a_second_bucket_is_filled_while_the_first_is_sent():
    for stage, times in ((1, 2), (2, 2), (3, 1)):
        plain, beside = (
            {p.name: p.update for p in parts(_WEIGHTS, 0, _TRACE, _UPDATE, _zero(stage, bucket=100, overlap=overlap))}
            for overlap in (False, True)
        )
        before, now = plain["ZeRO's buckets"], beside["ZeRO's buckets"]
        assert now - before == (times - 1) * 4 * 100
        assert plain.keys() == beside.keys()


def test_an_offloaded_optimizer_takes_nothing_of_the_gpu():
    held = {p.name: p for p in parts(_WEIGHTS, 77, _TRACE, _UPDATE, _zero(2, offload=True))}
    here = {p.name: p for p in parts(_WEIGHTS, 77, _TRACE, _UPDATE, _zero(2))}
    assert held["optimizer"].update == 0 < here["optimizer"].update
    assert held["gradients"] == here["gradients"]


@pytest.mark.parametrize("bucket", [100, 10_000])
def test_accumulated_gradients_are_held_twice_at_stage_2_only(bucket):
    for stage in range(4):
        options = (_WEIGHTS, 77, _TRACE, _UPDATE, _zero(stage, bucket=bucket))
        once, more = ({p.name: p for p in parts(*options, accumulation=n)}["gradients"] for n in (1, 4))
        assert more.update == (2 if stage == 2 else 1) * once.update
        assert more.backward == (2 if stage == 2 and bucket == 100 else 1) * once.backward


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 9))
def test_stage_2_keeps_whole_what_lies_in_a_rank_s_part(sizes, world):
    weights = [weight(n, group=("a", "b")[i % 2], name=str(i)) for i, n in enumerate(sizes)]
    own = []
    for rank in range(world):
        kept = 0
        for members, part in flat_groups(weights, world):
            owners = [i for i, w in enumerate(members) for _ in range(w.numel)]
            kept += sum(members[i].numel for i in set(owners[rank * part : (rank + 1) * part]))
        own.append(4 * kept)
        assert gradient_bytes(weights, _zero(2, world), rank=rank) == own[-1]
    assert gradient_bytes(weights, _zero(2, world)) == max(own)


def test_the_worse_moment_counts():
    found = parts(_WEIGHTS, 77, _TRACE, _UPDATE, _zero(0))
    sums = sum(p.backward for p in found), sum(p.update for p in found)
    assert total(found) == max(sums)
    assert sums[0] != sums[1]


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 50), st.integers(0, 50), st.integers(0, 9000))
def test_the_largest_batch_is_the_last_that_fits(batch, other, first, second, usable):
    """Two moments, each a constant and so much an image; none of both may be too large."""

    def taken(images):
        return [Part("fixed", 1000, 500), Part("an image", first * images, second * images)]

    assume(batch != other)
    found = largest_batch(taken(batch), batch, taken(other), other, usable)
    if found:
        assert total(taken(found)) <= usable
    if found < 10**6:
        assert total(taken(found + 1)) > usable


def test_k_means_copies_the_rows():
    assert between_epochs(configured("deepcluster"), 1000) == 4 * (1000 * 16 + (1 << 24))
    assert between_epochs(configured("simclr"), 1000) == 0
