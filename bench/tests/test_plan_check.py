"""Test that the plan's memory and traffic match two ranks at ZeRO 0 to 3."""

import json

import pytest

from bench import RESULTS
from bench.scale import plan_check


@pytest.fixture(scope="module")
def measured():
    return plan_check.on_two_ranks(plan_check.TINY)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_plan_matches_two_ranks(measured, stage):
    case, real = plan_check.TINY[stage], measured[stage]
    assert case["stage"] == stage
    result = plan_check.compare(case, real, plan_check.predict(case))
    assert [row for row in result["rows"] if not row["holds"]] == []
    sizes = {row["what"]: row["measured_bytes"] for row in result["rows"]}
    purposes = ("parameters", "teacher", "optimizer", "gradients", "activations")
    assert all(sizes[f"holds: {purpose}"] > 0 for purpose in purposes)
    assert sizes["sends: gradients"] > 0
    assert result["holds besides"] < 1000  # the purposes cover all storages


@pytest.mark.slow
def test_plan_that_differs_is_reported(measured):
    case = plan_check.TINY[1]
    plan = plan_check.predict(case)
    plan["held"]["optimizer"] *= 1.11
    plan["sent"]["gradients"] += 4
    result = plan_check.compare(case, measured[1], plan)
    assert [row["what"] for row in result["rows"] if not row["holds"]] == ["holds: optimizer", "sends: gradients"]
    assert "DIFFERS" in plan_check.summary(result)


def test_committed_results_match_the_plan():
    results = json.loads((RESULTS / "plan.json").read_text())["cases"]
    assert [{key: one[key] for key in ("method", "stage", "entropy", "values")} for one in results] == plan_check.CASES
    assert all(row["holds"] for one in results for row in one["rows"])
