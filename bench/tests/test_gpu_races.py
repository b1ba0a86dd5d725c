"""Test races, rooflines and tables of the losses. The timing needs a GPU."""

import json

import pytest
import torch

from bench import measure
from bench.gpu import chip_of, losses, prototypes
from bench.peers import OURS, Operation


def test_rooflines_match_the_data_sheets(aot):
    """Races count the same passes as bench/kernels/aot.py."""
    works = [losses.work(name, 64, 0) for name in ("info_nce", "vmf_entropy", "nt_xent", "bidirectional")]
    names = ("forward rows", "forward symmetric", "backward symmetric", "backward two passes")
    passes = (works[0].forward, works[1].forward, works[2].backward, works[3].backward)
    assert {name: aot._WORK[name] for name in names} == dict(zip(names, passes, strict=True))
    chips = [chip_of(capability, aot.CHIPS) for capability in ((9, 0), (8, 9))]
    assert (chips[0].name, chips[1]) == ("H100", None)
    race = next(race for race in prototypes.races() if race.operation.name == "dino")
    product = 2 * 65536 * 256 / chips[0].flops  # of one row
    expected = {"forward": (640 + 2 * 128) * product, "backward": (4 * 640 + 2 * 128) * product}
    assert prototypes.roofs(race, chips[0]) == pytest.approx(expected)
    assert prototypes.roofs(race, None) == {"forward": None, "backward": None}


@pytest.mark.parametrize(("module", "first"), [(losses, ("info_nce_queue", 256)), (prototypes, ("dino", 64))])
def test_races_are_the_grid_then_again_compiled(module, first):
    races = module.races()
    plain, compiled = races[: len(races) // 2], races[len(races) // 2 :]
    assert {race.contestants for race in compiled} == {(OURS, losses.COMPILED)}
    keys = [[(r.operation.name, r.case.name, r.dtype) for r in half] for half in (plain, compiled)]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(plain)
    assert (plain[0].operation.name, plain[0].case.rows, plain[0].dtype) == (*first, "bf16")
    assert all(set(r.contestants) <= set(r.operation.contestants) for r in races)
    assert all(r.contestants[0] == OURS and len(r.contestants) > 1 for r in races)


def _nt_xent(dtype="fp32", **contestants):
    own = losses.NT_XENT
    operation = Operation(own.name, (), own.inputs, {**own.contestants, **contestants}, "eager")
    case = losses.Case("B = 6", 6, 8, dtype=losses.TYPES[dtype])
    return losses.Race(operation, case, dtype, (OURS, *contestants, "eager"))


def _prototypes(name, dtype):
    operation = next(race.operation for race in prototypes.races() if race.operation.name == name)
    case = losses.Case("small", 3, 8, 40, dtype=losses.TYPES[dtype])
    return losses.Race(operation, case, dtype, (OURS, "eager"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["nt_xent", "dino", "patches"])
def test_contestants_agree_on_the_same_tensors(name, dtype, aot):
    race, module = (_nt_xent(dtype), losses) if name == "nt_xent" else (_prototypes(name, dtype), prototypes)
    results, times = losses.run_race(race, measure.seconds_per_call)
    assert results[OURS]["apart"] == 0
    assert results["eager"]["apart"] < (1e-5 if dtype == "fp32" else 0.1)
    assert results["eager"]["peak_bytes"] > 0
    assert times.keys() == {OURS, "eager", "forward", "backward"}
    assert len({len(values) for values in times.values()}) == 1
    row = losses.race_row(race, results, times, aot.CHIPS[1], module.roofs)
    assert 0 < row["pct_of_roofline"] < 100
    assert row["roofline_seconds"] == pytest.approx(sum(module.roofs(race, aot.CHIPS[1]).values()))
    assert row["contestants"]["eager"]["ratio"] > 0
    (head, _, line) = module.losses_table([row]).splitlines()
    assert head.count("|") == line.count("|")
    json.dumps(row, allow_nan=False)


def test_contestant_that_cannot_run_has_a_row_with_its_fault():
    """The second one runs out of memory in the timing, after the first calls."""
    errors = iter([None] * 8 + [torch.OutOfMemoryError("much")] * 99)

    def fail(error):
        if error is not None:
            raise error

    contestants = {
        "first": lambda case: fail(torch.OutOfMemoryError("much")),
        "second": lambda case: lambda z0, z1: fail(next(errors)) or (z0 * z1).sum(),
        "third": lambda case: fail(ModuleNotFoundError(name="lightly")),
    }
    race = _nt_xent(**contestants)
    results, times = losses.run_race(race, measure.seconds_per_call)
    faults = [results[name]["fault"] for name in ("first", "second", "third")]
    assert faults == ["OOM", "OOM", "lightly is not installed; pip install -e '.[bench]'"]
    assert times.keys() == {OURS, "eager", "forward", "backward"}
    row = losses.race_row(race, results, times, None)
    assert row["contestants"]["first"]["seconds"] is row["contestants"]["second"]["ratio"] is None
    assert row["contestants"]["eager"]["ratio"] > 0
    assert row["pct_of_roofline"] is row["forward_pct_of_roofline"] is None
