"""Seconds of a step: operators, update, and what is waited for."""

import pytest

from fasttrain.plan.communication import Traffic
from fasttrain.plan.hardware import GPUS, Cluster
from fasttrain.plan.ledger import Work
from fasttrain.plan.step_time import step_time
from fasttrain.plan.trace import Trace
from fasttrain.plan.update import Update
from fasttrain.plan.weights import Zero

from .small import weight

_WEIGHTS = (weight(1000), weight(1000, None, teacher=True, name="t"))
_ONE_SECOND = Work(int(989e12), 0)
_UPDATE = Update(0, 0, moved=int(3.35e12), teacher_moved=int(3.35e12), messages=())
_CLUSTER = Cluster(GPUS["h100"], 1, 2, flops_fraction=1.0, bandwidth_fraction=1.0, link_fraction=1.0, latency=0.0)


def _seconds(stage, sent=(), accumulation=1):
    trace = Trace(4, 0, 0, 0, 0, 0, (_ONE_SECOND,), (), ())
    zero = Zero(stage, 2, 1000, overlap=True, offload=False, persistent=0, reuse=1, prefetch=1, live=1)
    options = {"precision": "bf16", "accumulation": accumulation}
    return step_time(_WEIGHTS, trace, _UPDATE, sent, zero, _CLUSTER, **options)


@pytest.mark.parametrize(("stage", "update"), [(0, 2.0), (1, 1.5), (2, 1.5), (3, 1.0)])
def test_shards_share_the_update(stage, update):
    found = _seconds(stage)
    assert found.operators == pytest.approx(1)
    assert found.update == pytest.approx(update)
    assert found.total == pytest.approx(1 + update)


def test_micro_steps_repeat_the_operators_alone():
    assert _seconds(0, accumulation=3).operators == pytest.approx(3)
    assert _seconds(0, accumulation=3).update == pytest.approx(2)


@pytest.mark.parametrize(
    ("hidden", "seconds", "waited"), [(False, 0.5, 0.5), (True, 0.5, 0.0), (True, 1.5, 0.5), (False, 1.5, 1.5)]
)
def test_what_is_hidden_is_waited_for_as_far_as_it_is_longer(hidden, seconds, waited):
    sent = Traffic("gradients", "reduce_scatter", int(2 * 450e9 * seconds), 1, hidden)
    found = _seconds(3, [sent])
    assert found.sent == pytest.approx(seconds)
    assert found.waited == pytest.approx(waited, abs=1e-9)
