"""Seconds of a step: operators, update and exposed communication."""

from dataclasses import replace

import pytest

from fasttrain.plan.communication import Traffic
from fasttrain.plan.hardware import GPUS, Cluster
from fasttrain.plan.ledger import Work
from fasttrain.plan.step_time import step_time
from fasttrain.plan.trace import Trace
from fasttrain.plan.update import Update

from .small import weight, zero

_WEIGHTS = (weight(1000), weight(1000, None, teacher=True, name="t"))
_ONE_SECOND = Work(int(989e12), 0)
_UPDATE = Update(0, 0, moved=int(3.35e12), teacher_moved=int(3.35e12), messages=())
_IDEAL = {"flops_fraction": 1.0, "bandwidth_fraction": 1.0, "link_fraction": 1.0, "latency": 0.0}
_IDEAL |= {"host": 0.0, "host_update": 0.0, "host_zero3": 0.0}
_CLUSTER = Cluster(GPUS["h100"], 1, 2, **_IDEAL)


def _seconds(stage, sent=(), accumulation=1, **cluster):
    trace = Trace(4, 0, 0, 0, 0, 0, 900, (_ONE_SECOND,), (), (("a",), ("b",)))
    options = {"precision": "bf16", "accumulation": accumulation}
    own = replace(_CLUSTER, **cluster)
    return step_time(_WEIGHTS, trace, _UPDATE, sent, zero(stage, 2, overlap=True), own, **options)


@pytest.mark.parametrize(("stage", "update"), [(0, 2.0), (1, 1.5), (2, 1.5), (3, 1.0)])
def test_step_time_divides_the_update_between_shards(stage, update):
    for accumulation in (1, 3):
        time = _seconds(stage, accumulation=accumulation)
        assert (time.operators, time.update) == (pytest.approx(accumulation), pytest.approx(update))
        assert time.total == pytest.approx(accumulation + update)


@pytest.mark.parametrize(
    ("hidden", "seconds", "waited"), [(False, 0.5, 0.5), (True, 0.5, 0.0), (True, 1.5, 0.5), (False, 1.5, 1.5)]
)
def test_step_time_waits_for_exposed_communication(hidden, seconds, waited):
    sent = Traffic("gradients", "reduce_scatter", int(2 * 450e9 * seconds), 1, hidden)
    time = _seconds(3, [sent])
    assert (time.sent, time.waited) == (pytest.approx(seconds, abs=1e-5), pytest.approx(waited, abs=1e-5))


@pytest.mark.parametrize(("stage", "accumulation", "host"), [(0, 1, 14.0), (0, 2, 23.0), (3, 2, 27.0)])
def test_step_time_is_the_hosts_if_its_calls_take_longer(stage, accumulation, host):
    time = _seconds(stage, accumulation=accumulation, host=0.01, host_update=5.0, host_zero3=1.0)
    assert time.host == time.total == pytest.approx(host)
    assert _seconds(stage, host=0.0).total == pytest.approx(_seconds(stage).operators + _seconds(stage).update)
