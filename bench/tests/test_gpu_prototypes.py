"""The prototypes' parts of bench/gpu: what they decide and count; what they measure needs a GPU."""

import json

import pytest
import torch

from bench import measure
from bench.gpu import checks, losses, prototypes
from bench.peers import OURS
from tests.kernels.prototypes import stress

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_checks_reach_every_use_type_and_centre():
    every = prototypes.checks()
    assert len(set(map(str, every))) == len(every)
    assert {c.kind for c in every} == set(stress.KINDS)
    reference = [c for c in every if c.kind == "reference"]
    for use in stress.USES:
        centers = stress.CENTERS if use in stress.TAUGHT else ("none",)
        for dtype in checks.DTYPES:
            those = [c for c in reference if (c.use, c.dtype) == (use, dtype)]
            assert {c.center for c in those} == set(centers)
            assert max(c.shape[4] for c in those) == 1024
            assert all(c.shape[3] % 16 for c in those)
            assert any(c.shape[0] * c.shape[2] > c.shape[3] < c.shape[1] * c.shape[2] for c in those)
            assert any(c.shape[0] < c.shape[1] for c in those)
    repeated = [c for c in every if c.kind == "same bits"]
    assert {(c.use, c.dtype) for c in repeated} == {(use, t) for use in stress.USES for t in ("bf16", "fp32")}
    assert stress.REPEATS == 30


@pytest.mark.parametrize("use", stress.USES)
def test_a_check_runs_interpreted(use):
    check = prototypes.Check("reference", use, "bf16", (3, 2, 3, 19, 20), prototypes.one_center(use))
    row = checks.run_check(check, _DEVICE)
    assert (row["status"], row["detail"]) == ("right", None)
    assert row["check"].startswith(f"reference: {use}, bf16, 3 + 2 views of 3, K = 19, D = 20, center ")


def test_the_grid_is_whole_and_what_matters_comes_first():
    races = prototypes.races()
    plain = [race for race in races if losses.COMPILED not in race.contestants]
    assert races[: len(plain)] == plain
    assert [(r.operation.name, r.case.rows, r.case.columns, r.dtype) for r in plain] == [
        (name, batch, 65536, dtype)
        for dtype in ("bf16", "fp32")
        for name, batch in (("dino", 64), ("patches", 4096), ("dino", 16))
    ]
    assert {race.contestants for race in plain} == {(OURS, "lightly", "eager")}
    assert {race.contestants for race in races[len(plain) :]} == {(OURS, "torch.compile")}
    assert len(races) == 2 * len(plain)
    assert str(races[0]) == "dino, 10 + 2 views of 64, K = 65536, D = 256, bf16: lightly, eager"


def test_rooflines_are_those_of_the_data_sheets(aot):
    names = {"class tokens": ("dino", 64), "patches": ("patches", 4096)}
    races = {(r.operation.name, r.case.rows): r for r in prototypes.races() if r.dtype == "bf16"}
    for known in aot.prototype_rooflines():
        if known["rows"] in names:
            chip = next(chip for chip in aot.CHIPS if chip.name == known["chip"])
            found = prototypes.roofs(races[names[known["rows"]]], chip)
            assert 1e3 * sum(found.values()) == pytest.approx(known["roofline_ms"])
    assert prototypes.roofs(races["dino", 64], None) == {"forward": None, "backward": None}
    h100 = aot.CHIPS[1]
    product = 2 * 65536 * 256 / h100.flops  # of one row
    found = prototypes.roofs(races["dino", 64], h100)
    assert found["forward"] == pytest.approx((640 + 2 * 128) * product)
    assert found["backward"] == pytest.approx((4 * 640 + 2 * 128) * product)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dino", "patches"])
def test_contestants_run_from_the_same_tensors_and_agree(name, dtype, aot):
    operation = next(race.operation for race in prototypes.races() if race.operation.name == name)
    case = losses.Case("small", 3, 8, 40, dtype=losses.TYPES[dtype])
    race = losses.Race(operation, case, dtype, (OURS, "eager"))
    student, teacher, *_ = operation.draw(case)
    assert (len(student), len(teacher)) == {"dino": (10, 2), "patches": (2, 2)}[name]
    found, times = losses.hold(race, measure.seconds_per_call)
    assert found["eager"]["apart"] < (1e-5 if dtype == "fp32" else 0.1)
    assert found["eager"]["peak_bytes"] > 0
    assert times.keys() == {OURS, "eager", "forward", "backward"}
    row = losses.race_row(race, found, times, aot.CHIPS[1], prototypes.roofs)
    assert 0 < row["pct_of_roofline"] < 100
    assert row["roofline_seconds"] == pytest.approx(sum(prototypes.roofs(race, aot.CHIPS[1]).values()))
    (head, _, line) = prototypes.losses_table([row]).splitlines()
    assert "inf-cl" not in head
    assert head.count("|") == line.count("|")
    assert line.startswith(f"| {name} | 3 x 40 | 8 | {dtype} | ")
    json.dumps(row, allow_nan=False)


def test_a_peer_that_runs_out_of_memory_has_a_row_that_says_so(monkeypatch):
    def much(case):
        raise torch.OutOfMemoryError("much")

    operation = next(race.operation for race in prototypes.races() if race.operation.name == "patches")
    monkeypatch.setitem(operation.contestants, "lightly", much)
    case = losses.Case("small", 3, 8, 40)
    race = losses.Race(operation, case, "fp32", (OURS, "lightly", "eager"))
    row = losses.race_row(race, *losses.hold(race, measure.seconds_per_call), None, prototypes.roofs)
    assert row["contestants"]["lightly"]["fault"] == "OOM"
    assert row["contestants"]["eager"]["ratio"] > 0
    assert row["pct_of_roofline"] is None
    assert "| OOM | " in prototypes.losses_table([row])
