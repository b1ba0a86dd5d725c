"""Traffic by purpose. bench/tests/test_plan_check.py compares it with the messages of two ranks."""

import pytest

from fasttrain.plan.communication import Traffic, gradient_traffic, traffic
from fasttrain.plan.group import Message
from fasttrain.plan.trace import Trace
from fasttrain.plan.update import Update

from .small import weight, zero

_WEIGHTS = (
    weight(1001, sent=2),
    weight(201),
    weight(8, "no_decay"),
    weight(1001, None, teacher=True, sent=2, name="t"),
)
_MESSAGES = (Message("all_gather", 5, "loss"), Message("all_gather", 6, "loss"), Message("all_reduce", 7, "loss"))
_TRACE = Trace(4, 0, 0, 0, 0, 0, 0, (), _MESSAGES, (("decay.1001",), ("t",), ("decay.1001",)))
_UPDATE = Update(0, 0, 0, 0, (Message("broadcast", 9, "BatchNorm"),))


def _zero(stage, **options):
    return zero(stage, **{"bucket": 500, "persistent": 300, "prefetch": 10**6, **options})


def _by_purpose(stage, accumulation=1, **options):
    operations = traffic(_WEIGHTS, _TRACE, _UPDATE, _zero(stage, **options), accumulation=accumulation)
    return {(t.about, t.kind): t for t in operations}


@pytest.mark.parametrize(
    ("stage", "kind", "size", "times"),
    [
        (0, "all_reduce", 4 * (1024 + 256 + 64), 1),  # every weight is padded to 64 elements
        (1, "all_reduce", 2 * 1001 + 4 * 209, 1),
        (2, "all_reduce", 2 * 1001 + 4 * 209, 4),
        (3, "reduce_scatter", 2 * 1004 + 4 * (204 + 8), 4),  # every weight is padded to the ranks
    ],
)
def test_gradient_traffic_repeats_from_stage_2(stage, kind, size, times):
    assert gradient_traffic(_WEIGHTS, _zero(stage)) == [Traffic("gradients", kind, size, 3)]
    assert gradient_traffic(_WEIGHTS, _zero(stage), 4) == [Traffic("gradients", kind, times * size, times * 3)]


def test_traffic_of_parameters_by_stage():
    updated = _by_purpose(1)["updated parameters", "all_gather"]
    assert (updated.bytes, updated.messages) == (4 * (1208 + 8), 2)
    assert not any("parameters" in about for about, _ in _by_purpose(0))
    operations = _by_purpose(3, accumulation=2)
    assert operations["fetched parameters", "all_gather"].bytes == 2 * 2 * (1004 + 1004)
    assert operations["small parameters", "all_gather"].bytes == 4 * (204 + 8)


def test_traffic_of_the_method_is_summed_and_repeated():
    operations = _by_purpose(0, accumulation=3)
    assert operations["loss", "all_gather"] == Traffic("loss", "all_gather", 33, 6)
    assert operations["loss", "all_reduce"].bytes == 21
    assert operations["BatchNorm", "broadcast"].bytes == 9
    assert _by_purpose(3, world=1) == {}


@pytest.mark.parametrize("overlap", [False, True])
def test_traffic_hides_gradients_and_fetched_parameters_only(overlap):
    hidden = {about for (about, _), t in _by_purpose(3, overlap=overlap).items() if t.hidden}
    assert hidden == ({"gradients", "fetched parameters"} if overlap else set())
