"""What the plan says of memory and traffic is what two ranks hold and send, at ZeRO 0 to 3."""

import json

import pytest

from bench import RESULTS
from bench.scale import plan_check


@pytest.fixture(scope="module")
def measured():
    return plan_check.on_two_ranks(plan_check.TINY)


@pytest.mark.parametrize("stage", range(4))
def test_two_ranks_hold_and_send_what_the_plan_says(measured, stage):
    case, real = plan_check.TINY[stage], measured[stage]
    assert case["stage"] == stage
    found = plan_check.compare(case, real, plan_check.predict(case))
    assert [row for row in found["rows"] if not row["holds"]] == []
    rows = {row["what"]: row["measured_bytes"] for row in found["rows"]}
    assert all(
        rows[f"holds: {name}"] > 0 for name in ("parameters", "teacher", "optimizer", "gradients", "activations")
    )
    assert rows["sends: gradients"] > 0
    assert found["holds besides"] < 1000  # nothing is left out


def test_a_plan_that_is_apart_is_seen(measured):
    case = plan_check.TINY[1]
    said = plan_check.predict(case)
    said["held"]["optimizer"] *= 1.11
    said["sent"]["gradients"] += 4
    found = plan_check.compare(case, measured[1], said)
    assert [row["what"] for row in found["rows"] if not row["holds"]] == ["holds: optimizer", "sends: gradients"]
    assert "APART in" in plan_check.summary(found)


def test_the_results_that_are_kept_hold():
    kept = json.loads((RESULTS / "plan.json").read_text())
    cases = [{key: one[key] for key in ("method", "stage", "entropy", "values")} for one in kept["cases"]]
    assert cases == plan_check.CASES
    assert all(row["holds"] for one in kept["cases"] for row in one["rows"])
