"""The rooflines and the races of the losses: percentages, ratios and tables; timing them needs a GPU."""

import json

import pytest
import torch

from bench import measure
from bench.gpu import chip_of, losses, roofline_seconds
from bench.peers import OURS, Operation


def test_a_gpu_is_matched_by_its_capability(aot):
    assert chip_of((9, 0), aot.CHIPS).name == "H100"
    assert chip_of((8, 0), aot.CHIPS).name == "A100"
    assert chip_of((8, 9), aot.CHIPS) is None


def test_rooflines_are_those_of_the_data_sheets(aot):
    for known in aot.rooflines():
        chip = next(chip for chip in aot.CHIPS if chip.name == known["chip"])
        uses = {
            "forward rows": losses.work("info_nce", known["rows"], 0).forward,
            "forward symmetric": losses.work("vmf_entropy", known["rows"], 0).forward,
            "backward symmetric": losses.work("nt_xent", known["rows"] // 2, 0).backward,
            "backward two passes": losses.work("bidirectional", known["rows"], 0).backward,
        }
        for use, milliseconds in known["roofline_ms"].items():
            products, exps = uses[use]
            found = roofline_seconds(chip, known["rows"] ** 2, known["dim"], "bf16", products=products, exps=exps)
            assert 1e3 * found == pytest.approx(milliseconds)
    assert roofline_seconds(None, 1, 1, "bf16", products=1, exps=1) is None
    slow, fast = (roofline_seconds(aot.CHIPS[1], 1e6, 1024, t, products=1, exps=1) for t in ("fp32", "bf16"))
    assert slow == pytest.approx(6 * fast)


def test_the_grid_is_whole_and_what_matters_comes_first():
    races = losses.races()
    assert len(races) == 2 * len({(r.operation.name, r.case.name, r.dtype) for r in races})
    plain = [race for race in races if losses.COMPILED not in race.contestants]
    assert races[: len(plain)] == plain
    for name in ("nt_xent", "info_nce", "bidirectional", "vmf_entropy"):
        sizes = {(r.case.rows, r.case.dim, r.dtype) for r in plain if r.operation.name == name}
        batches = {256, 1024, 4096, 8192, 16384, 32768, 65536}
        assert sizes == {(b, d, t) for b in batches for d in (128, 256) for t in ("bf16", "fp32")}
    (queue, *_) = [r for r in plain if r.operation.name == "info_nce_queue"]
    assert (queue.case.rows, queue.case.columns) == (256, 65536)
    assert queue.contestants == (OURS, "lightly", "eager")
    assert plain[1].contestants == (OURS, "lightly", "eager")
    assert (plain[1].operation.name, plain[1].dtype, plain[1].case.dim) == ("nt_xent", "bf16", 128)
    assert {r.contestants for r in races[len(plain) :]} == {(OURS, losses.COMPILED)}
    assert all(set(r.contestants) <= set(r.operation.contestants) for r in races)


def _race(dtype="fp32", **contestants):
    case = losses.Case("B = 6", 6, 8, dtype=losses.TYPES[dtype])
    given = losses.NT_XENT
    operation = Operation(given.name, (), given.inputs, {**given.contestants, **contestants}, "eager")
    return losses.Race(operation, case, dtype, (OURS, *contestants, "eager"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_contestants_run_from_the_same_tensors_and_agree(dtype):
    race = _race(dtype)
    found, times = losses.hold(race, measure.seconds_per_call)
    assert found[OURS]["apart"] == 0
    assert found["eager"]["apart"] < (1e-5 if dtype == "fp32" else 0.05)
    assert found["eager"]["peak_bytes"] > 0
    assert times.keys() == {OURS, "eager", "forward", "backward"}
    assert len({len(values) for values in times.values()}) == 1
    row = losses.race_row(race, found, times, None)
    assert row["pct_of_roofline"] is row["roofline_seconds"] is row["forward_pct_of_roofline"] is None
    assert row["contestants"]["eager"]["ratio"] > 0
    assert not row["contestants"]["eager"]["differs"]
    json.dumps(row, allow_nan=False)


def test_a_contestant_that_runs_out_of_memory_has_a_row_that_says_so():
    calls = iter(range(99))

    def at_once(case):
        raise torch.OutOfMemoryError("much")

    def later(case):
        def loss(z0, z1):
            if next(calls) >= 8:
                raise torch.OutOfMemoryError("much")
            return (z0 * z1).sum()

        return loss

    def absent(case):
        raise ModuleNotFoundError(name="lightly")

    race = _race(first=at_once, second=later, third=absent)
    found, times = losses.hold(race, measure.seconds_per_call)
    assert found["first"] == {"fault": "OOM"}
    assert found["second"]["fault"] == "OOM"
    assert found["third"]["fault"] == "lightly is not installed; pip install -e '.[bench]'"
    assert times.keys() == {OURS, "eager", "forward", "backward"}
    row = losses.race_row(race, found, times, None)
    assert row["contestants"]["first"]["seconds"] is row["contestants"]["second"]["ratio"] is None
    assert row["contestants"]["eager"]["ratio"] > 0


def test_percentages_ratios_and_the_table(aot):
    race = losses.Race(losses.NT_XENT, losses.Case("B = 4096", 4096, 128), "bf16", (OURS, "lightly", "eager"))
    scores, chip = 8192**2, aot.CHIPS[1]
    forward, backward = max(scores * 128 / chip.flops, scores / 2 / chip.exps), 4 * scores * 128 / chip.flops
    found = {
        OURS: {"fault": None, "peak_bytes": 2**20, "apart": 0.0, "host_seconds": 7e-4},
        "lightly": {"fault": "OOM"},
        "eager": {"fault": None, "peak_bytes": 40 * 2**20, "apart": 0.2},
    }
    times = {OURS: [2e-4, 1e-4], "eager": [4e-4, 3e-4], "forward": [5e-5, 5e-5], "backward": [8e-5, 8e-5]}
    row = losses.race_row(race, found, times, chip)
    assert row["roofline_seconds"] == pytest.approx(forward + backward)
    assert row["pct_of_roofline"] == pytest.approx(100 * (forward + backward) / 1e-4, rel=1e-2)
    assert row["forward_pct_of_roofline"] == pytest.approx(100 * forward / 5e-5, rel=1e-2)
    assert row["contestants"]["eager"]["ratio"] == 2.5
    assert row["contestants"]["eager"]["differs"]
    compiled = losses.Race(race.operation, race.case, "bf16", (OURS, losses.COMPILED))
    found = {OURS: found[OURS], losses.COMPILED: {"fault": None, "peak_bytes": 2**21, "apart": 0.01}}
    second = losses.race_row(compiled, found, {OURS: [1e-4], losses.COMPILED: [3e-4]}, chip)
    lines = losses.losses_table([row, second]).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| nt_xent | 4096 | 128 | bf16 | 0.1 / 0.15 | 0.05 | 0.08 |")
    assert lines[2].endswith(f"| {row['pct_of_roofline']} | 0.7 | 1 | OOM |  | 2.5, 40, differs by 0.2 | 3, 2 |")
    assert len({line.count("|") for line in lines}) == 1


def test_the_table_of_a_row_where_ours_did_not_run():
    race = losses.Race(losses.NT_XENT, losses.Case("B = 4", 4, 128), "bf16", (OURS, "eager"))
    found = {OURS: {"fault": "OOM"}, "eager": {"fault": None, "peak_bytes": 3, "apart": None}}
    row = losses.race_row(race, found, {"eager": [2e-3]}, None)
    (*_, line) = losses.losses_table([row]).splitlines()
    assert line == "| nt_xent | 4 | 128 | bf16 | OOM |  |  |  |  |  |  |  | 2 ms |  |"
