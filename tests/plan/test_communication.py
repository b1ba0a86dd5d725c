"""Traffic by purpose; bench/tests/test_plan_check.py holds it to what two ranks send."""

import pytest

from fasttrain.plan.communication import Traffic, gradient_traffic, traffic
from fasttrain.plan.group import Message
from fasttrain.plan.trace import Trace
from fasttrain.plan.update import Update
from fasttrain.plan.weights import Zero

from .small import weight

_WEIGHTS = (
    weight(1001, sent=2),
    weight(201),
    weight(8, "no_decay"),
    weight(1001, None, teacher=True, sent=2, name="t"),
)
_MESSAGES = (Message("all_gather", 5, "loss"), Message("all_gather", 6, "loss"), Message("all_reduce", 7, "loss"))
_TRACE = Trace(4, 0, 0, 0, 0, 0, (), _MESSAGES, (("decay.1001",), ("t",), ("decay.1001",)))
_UPDATE = Update(0, 0, 0, 0, (Message("broadcast", 9, "BatchNorm"),))


def _zero(stage, world=4, overlap=False, bucket=500):
    return Zero(stage, world, bucket, overlap, offload=False, persistent=300, reuse=10**6, prefetch=10**6, live=0)


def _by_purpose(stage, **options):
    return {(t.about, t.kind): t for t in traffic(_WEIGHTS, _TRACE, _UPDATE, _zero(stage), **options)}


@pytest.mark.parametrize(
    ("stage", "kind", "size"),
    [
        (0, "all_reduce", 4 * 1210),
        (1, "all_reduce", 2 * 1001 + 4 * 209),
        (2, "all_reduce", 2 * 1001 + 4 * 209),
        (3, "reduce_scatter", 2 * 1004 + 4 * (204 + 8)),  # every weight padded to the ranks
    ],
)
def test_gradients(stage, kind, size):
    assert gradient_traffic(_WEIGHTS, _zero(stage)) == [Traffic("gradients", kind, size, 3)]


@pytest.mark.parametrize(("stage", "times"), [(0, 1), (1, 1), (2, 4), (3, 4)])
def test_gradients_that_accumulate_are_sent_once_below_stage_2(stage, times):
    (once,), (more,) = (gradient_traffic(_WEIGHTS, _zero(stage), n) for n in (1, 4))
    assert (more.bytes, more.messages) == (times * once.bytes, times * once.messages)


def test_weights_come_back_after_the_update_at_stages_1_and_2():
    found = _by_purpose(1)["updated parameters", "all_gather"]
    assert (found.bytes, found.messages) == (4 * (1208 + 8), 2)
    assert not any("parameters" in about for about, _ in _by_purpose(0))


def test_stage_3_fetches_large_weights_and_gathers_small_ones():
    found = _by_purpose(3, accumulation=2)
    assert found["fetched parameters", "all_gather"].bytes == 2 * 2 * (1004 + 1004)
    assert found["small parameters", "all_gather"].bytes == 4 * (204 + 8)


@pytest.mark.parametrize("overlap", [False, True])
def test_only_gradients_and_fetched_weights_run_beside_the_products(overlap):
    found = traffic(_WEIGHTS, _TRACE, _UPDATE, _zero(3, overlap=overlap))
    hidden = {t.about for t in found if t.hidden}
    assert hidden == ({"gradients", "fetched parameters"} if overlap else set())


def test_what_the_method_sends_is_summed_and_repeated_with_micro_steps():
    found = _by_purpose(0, accumulation=3)
    assert found["loss", "all_gather"] == Traffic("loss", "all_gather", 33, 6)
    assert found["loss", "all_reduce"].bytes == 21
    assert found["BatchNorm", "broadcast"].bytes == 9


def test_one_rank_sends_nothing():
    assert traffic(_WEIGHTS, _TRACE, _UPDATE, _zero(3, world=1)) == ()
