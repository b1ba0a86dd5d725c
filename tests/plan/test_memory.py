"""Memory by purpose at every stage. bench/tests/test_plan_check.py compares it with DeepSpeed."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fasttrain.plan.memory import Part, gradient_bytes, largest_batch, parts, shard_elements, total
from fasttrain.plan.trace import Trace
from fasttrain.plan.update import Update
from fasttrain.plan.weights import flat_groups

from .small import weight, zero

_WEIGHTS = (weight(1000), weight(200), weight(8, "no_decay"), weight(1000, None, teacher=True, name="t"))
_TRACE = Trace(4, 1000, 100, 50, 70, 30, 0, (), (), ())
_UPDATE = Update(state=2 * 4 * 1208, temporary=4 * 1208, moved=0, teacher_moved=0, messages=())


def _parts(stage, moment=None, weights=_WEIGHTS, accumulation=1, **options):
    settings = zero(stage, **{"bucket": 10_000, **options})
    memory = parts(weights, 77, _TRACE, _UPDATE, settings, accumulation=accumulation)
    return {p.name: p if moment is None else getattr(p, moment) for p in memory}


def test_stage_0_has_everything_whole():
    memory = _parts(0, "backward")
    assert memory["parameters"] == memory["gradients"] == 4 * 1208
    assert (memory["teacher"], memory["optimizer"]) == (4 * 1000, 8 * 1208)
    assert (memory["activations"], memory["loss"], memory["buffers"], memory["temporary"]) == (1000, 100, 77, 70)
    assert memory["views"] == 3 * 30  # the current batch and two prefetched ones
    assert memory["ZeRO's buckets"] == 0
    update = _parts(0, "update")
    assert update["temporary"] == 4 * 1208  # the optimizer's, or the copy of a bucket
    assert update["activations"] == 0
    assert total(_parts(0).values()) == max(sum(memory.values()), sum(update.values()))
    assert sum(memory.values()) != sum(update.values())


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_shard_the_optimizer_and_have_buckets(stage):
    memory = _parts(stage, "backward")
    assert memory["parameters"] == 4 * 1208
    assert shard_elements(_WEIGHTS, zero(stage)) == 300 + 2
    assert memory["optimizer"] == 12 * 302  # with master weights
    assert memory["gradients"] == (4 * 1208 if stage == 1 else 4 * (1000 + 200 + 8))
    assert memory["ZeRO's buckets"] == 4 * 10_000 + (0 if stage == 1 else 4 * 1208)


def test_stage_3_shards_all_but_small_weights():
    memory = _parts(3, "backward")
    assert memory["parameters"] == 4 * (250 + 50 + 2 + 8)  # the small weight is stored whole and sharded
    assert memory["teacher"] == 4 * 250
    assert (memory["optimizer"], memory["gradients"]) == (8 * 302, 4 * 302)


def test_buckets_exist_per_precision_and_twice_with_overlap():
    low = (weight(1000, sent=2), weight(200))
    for stage, size in ((1, 2 * 4), (3, 4 + 2)):
        assert _parts(stage, "update", weights=low)["ZeRO's buckets"] == size * 10_000
    for stage, times in ((1, 2), (2, 2), (3, 1)):
        alone, overlapped = (
            _parts(stage, "update", bucket=100, overlap=overlap)["ZeRO's buckets"] for overlap in (False, True)
        )
        assert overlapped - alone == (times - 1) * 4 * 100


def test_offloaded_optimizer_has_no_gpu_memory():
    host, gpu = (_parts(2, "update", offload=offload) for offload in (True, False))
    assert host["optimizer"] == 0 < gpu["optimizer"]
    assert host["gradients"] == gpu["gradients"]


@pytest.mark.parametrize("bucket", [100, 10_000])
@pytest.mark.parametrize("stage", range(4))
def test_accumulated_gradients_exist_twice_at_stage_2(stage, bucket):
    once, more = (_parts(stage, bucket=bucket, accumulation=n)["gradients"] for n in (1, 4))
    assert more.update == (2 if stage == 2 else 1) * once.update
    assert more.backward == (2 if stage == 2 and bucket == 100 else 1) * once.backward


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 9))
def test_stage_2_keeps_whole_gradients_of_a_rank_s_part(sizes, world):
    weights = [weight(n, group=("a", "b")[i % 2], name=str(i)) for i, n in enumerate(sizes)]
    own = []
    for rank in range(world):
        kept = 0
        for members, part in flat_groups(weights, world):
            owners = [i for i, w in enumerate(members) for _ in range(w.numel)]
            kept += sum(members[i].numel for i in set(owners[rank * part : (rank + 1) * part]))
        own.append(4 * kept)
        assert gradient_bytes(weights, zero(2, world), rank=rank) == own[-1]
    assert gradient_bytes(weights, zero(2, world)) == max(own)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 50), st.integers(0, 50), st.integers(0, 9000))
def test_largest_batch_is_the_last_that_fits(batch, other, first, second, usable):
    def memory(images):
        return [Part("fixed", 1000, 500), Part("per image", first * images, second * images)]

    assume(batch != other)
    largest = largest_batch(memory(batch), batch, memory(other), other, usable)
    if largest:
        assert total(memory(largest)) <= usable
    if largest < 10**6:
        assert total(memory(largest + 1)) > usable
