"""The committed counts of messages cover every case, and the demo's step has at most 30."""

import json

from bench import RESULTS
from bench.scale import messages


def test_committed_counts_are_of_every_case_and_fell():
    results = json.loads((RESULTS / "messages.json").read_text())
    before, after = (results[label]["rows"] for label in ("before", "after"))
    names = ("method", "entropy", "network", "stage")
    counted = {row["method"] for row in before}  # later methods have no counts from before
    assert len(counted) == 10
    cases = [case for case in messages.cases() if case["method"] in counted]
    for rows in (before, after):
        assert [{name: row[name] for name in names} for row in rows] == cases
        assert all(row["all"] == sum(row["causes"].values()) for row in rows)
        assert {cause for row in rows for cause in row["causes"]} <= set(messages.CAUSES)
    assert all(new["all"] < old["all"] for old, new in zip(before, after, strict=True))
    (demo,) = [row for row in after if [row[name] for name in names] == ["dino", True, "conv_small", 0]]
    assert demo["all"] <= 30
    twins = [row for row in after if row["entropy"] and row["method"] in ("byol", "simclr", "simsiam", "mocov3")]
    assert all(row["causes"]["loss"] <= 8 for row in twins)
