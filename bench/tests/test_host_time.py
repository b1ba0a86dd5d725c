"""The plan's times of the host are the measured ones."""

import json

import pytest

from bench import RESULTS
from bench.scale.host_time import launched_operators, slope_of
from fasttrain.cli.plan import PlanOptions
from fasttrain.plan.hardware import GPUS, Cluster


def test_the_plan_has_the_measured_times():
    measured, cluster = json.loads((RESULTS / "host-time.json").read_text()), Cluster(GPUS["h100"])
    for name, used in (("operator_h100", cluster.host), ("tensor_h100", cluster.host_update)):
        assert used == pytest.approx(measured[f"seconds_per_{name}"], rel=0.01)
    assert cluster.host_zero3 == pytest.approx(measured["seconds_per_module"], rel=0.01)
    assert PlanOptions().host_time == pytest.approx(cluster.host * 1e6)


def test_operators_of_eager_losses_are_counted_and_the_slope_ignores_a_start():
    rows = launched_operators()
    assert len(rows) == 5
    assert all(10 < row["operators"] < 100 and 0 < row["seconds"] < 0.01 for row in rows)
    assert slope_of([1, 2, 3], [5.0, 7.0, 9.0]) == pytest.approx(2)
