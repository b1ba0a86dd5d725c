"""What bench/gpu.py decides, counts and writes; what it measures needs a GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gpu
import measure
import pytest
import torch
from gpu_parts import (
    Budget,
    DeviceLost,
    Part,
    Run,
    WorkerLost,
    attempt,
    checks,
    chip_of,
    losses,
    roofline_seconds,
    similarity,
)
from peers import OURS, NotRun, Operation

from fasttrain.kernels.similarity import launch  # before bench/aot.py, which has its kernels compiled
from tests.kernels.similarity import stress, uses
from tests.kernels.tolerances import assert_close

_ROOT = Path(__file__).parents[2]


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def run(tmp_path, clock):
    return Run(tmp_path / "results" / "a.json", {"device": "none"}, Budget(100, clock))


# The run


def test_a_part_stops_at_its_share_and_names_what_it_left_out(run, clock):
    def work(run):
        for item in run.in_time(["a", "b", "c", "d"]):
            run.add({"item": item})
            clock.now += 20

    rows = run.start(Part("work", work, str, until=0.4))
    work(run)
    assert [row["item"] for row in rows] == ["a", "b"]
    assert run.finish(None) == ["c", "d"]
    written = json.loads(run.path.read_text())["parts"]["work"]
    assert written == {"rows": rows, "left_out": ["c", "d"], "error": None, "seconds": 40.0}


def test_rows_are_on_disk_before_the_part_ends(run, clock):
    run.start(Part("work", print, str, until=1))
    run.add({"item": 1})
    assert not run.path.exists()
    clock.now += 6
    run.add({"item": 2})
    assert len(json.loads(run.path.read_text())["parts"]["work"]["rows"]) == 2
    assert [path.name for path in run.path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("workers", [0, 2])
def test_work_is_done_side_by_side_and_matched_to_its_item(run, workers):
    run.workers = workers
    assert dict(run.side_by_side(math.sqrt, [1, 4, 9])) == {1: 1.0, 4: 2.0, 9: 3.0}


def test_a_worker_that_dies_is_not_waited_for(run):
    run.workers = 1
    with pytest.raises(WorkerLost, match="in one of: 3"):
        list(run.side_by_side(os._exit, [3]))


def _ends(run, *parts):
    status = gpu.run_parts(run, list(parts))
    return status, json.loads(run.path.read_text())


def test_what_is_wrong_ends_the_run_and_is_written(run, capsys):
    check = Part("check", lambda run: run.add({"x": 1}), str, 1, lambda rows: [f"x is {rows[0]['x']}"], bool)
    status, content = _ends(run, check, Part("time", print, str, 1))
    assert status == 1
    assert content["failures"] == ["x is 1"]
    assert list(content["parts"]) == ["check"]
    assert "**x is 1**" in capsys.readouterr().out


def test_a_deciding_part_that_breaks_ends_the_run(run, capsys):
    status, content = _ends(run, Part("check", lambda run: 1 / 0, str, 1, None, any), Part("time", print, str, 1))
    assert status == 1
    assert content["failures"] == ["check: ZeroDivisionError: division by zero"]
    assert list(content["parts"]) == ["check"]


def test_a_failure_that_does_not_stop_is_a_failure(run, capsys):
    check = Part("check", lambda run: None, str, 1, lambda rows: ["a little off"], any)
    status, content = _ends(run, check, Part("time", lambda run: None, str, 1))
    assert status == 1
    assert list(content["parts"]) == ["check", "time"]


def test_a_part_that_fails_leaves_its_rows_and_the_other_parts(run, capsys):
    def failing(run):
        run.add({"x": 1})
        raise DeviceLost("gone")

    status, content = _ends(run, Part("one", failing, str, 1), Part("two", lambda run: run.add({"y": 2}), str, 1))
    assert status == 1
    assert content["failures"] == ["one: DeviceLost: gone"]
    assert content["parts"]["one"]["rows"] == [{"x": 1}]
    assert content["parts"]["one"]["error"] == "DeviceLost: gone"
    assert content["parts"]["two"]["rows"] == [{"y": 2}]


def test_a_right_run_ends_with_status_0(run, clock, capsys):
    def slow(run):
        for _ in run.in_time(range(30)):
            clock.now += 50

    status, content = _ends(run, Part("check", slow, str, 1, lambda rows: [], any))
    assert status == 0
    assert content["failures"] == []
    printed = capsys.readouterr().out
    assert "left out, 28:" in printed
    assert "and 18 more" in printed


def test_what_prevents_a_call_is_named():
    def fails(error):
        raise error

    assert attempt(lambda: 3) == (3, None)
    assert attempt(lambda: fails(torch.OutOfMemoryError("much"))) == (None, "OOM")
    assert attempt(lambda: fails(NotRun("x is not installed"))) == (None, "NotRun: x is not installed")
    assert attempt(lambda: fails(ValueError("a line\nanother"))) == (None, "ValueError: a line")


def test_the_report_is_named_after_the_gpu():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu.slug("NVIDIA GeForce RTX 4090 (laptop)") == "nvidia-geforce-rtx-4090-laptop"


def test_nvidia_smi_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu.nvidia_smi(("driver_version",), object()).startswith("no answer: ")


def test_the_digest_follows_the_sources(tmp_path):
    (tmp_path / "a.py").write_text("1")
    before = gpu.sources_digest(tmp_path)
    assert gpu.sources_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("2")
    assert gpu.sources_digest(tmp_path) != before


def test_every_part_can_be_chosen_and_the_last_may_spend_the_budget():
    parts = gpu.parts()
    assert tuple(part.name for part in parts) == tuple(gpu._options([]).parts)
    shares = [part.until for part in parts]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_without_a_gpu_it_says_so_in_a_line_and_ends_with_status_2():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "bench/gpu.py"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("bench/gpu.py needs an NVIDIA GPU; torch sees none")
    assert done.stderr.count("\n") == 1


def test_who_goes_first_moves_on_and_time_ends_it(monkeypatch):
    order = []
    timers = [lambda name=name: order.append(name) or len(order) for name in "abc"]
    times = measure.in_turn(timers, fewest=2, most=9, seconds=0)
    assert "".join(order) == "abcbca"
    assert times == [[1, 6], [2, 4], [3, 5]]
    assert measure.least_and_median([3.00004, 1.0, 2.0]) == {"min": 1.0, "median": 2.0}


# Rooflines


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


# Correctness


def test_checks_reach_every_use_type_and_path():
    every = similarity.checks()
    assert len(set(map(str, every))) == len(every)
    reference = [c for c in every if c.kind == "reference"]
    bounded = {c.unit_norm and c.scale <= 40 for c in reference}
    assert bounded == {True, False}
    names = {dtype: name for name, dtype in checks.DTYPES.items()}
    for use, dtype in uses.uses_and_types(torch.float32, torch.float16, torch.bfloat16):
        those = [c for c in reference if (c.use, c.dtype) == (use, names[dtype])]
        assert {c.unit_norm and c.scale <= 40 for c in those} == {True, False}
        assert max(c.d for c in those) == 2048
        assert max(c.n for c in those) == max(c.m for c in those) == 4097
    assert {c.use for c in every if c.kind == "same bits"} == set(uses.USES)
    assert {c.kind for c in every} == set(stress.KINDS)
    (far,) = [c for c in every if c.kind.startswith("offsets")]
    assert far.n * far.d > 2**31
    tallest = max(c.n for c in every if c.kind == "several blocks of rows")
    tile = similarity.Group("forward, symmetric", 128, "bf16").shipped()
    assert tallest > launch._MOST_SLOTS * tile.block_m


def test_a_check_runs_interpreted():
    check = similarity.Check("reference", "both directions", "fp16", 17, 33, 20)
    row = checks.run_check(check, _device())
    assert (row["status"], row["detail"]) == ("right", None)


def _off_by(times):
    """What the project's own comparison says of a result that is so many tolerances away."""
    try:
        assert_close(torch.ones(3) * (1 + times * 2e-6), torch.ones(3), torch.float32, 1.0, "rows, dx")
    except AssertionError as error:
        return error
    raise ValueError("it is right")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (_off_by(3), "inaccurate"),
        (_off_by(300), "wrong"),
        (AssertionError("rows, dx: NaN in other places"), "wrong"),
        (AssertionError("rows, dx: RMS ratio nan, allowed 2.0e-06"), "wrong"),
        (torch.OutOfMemoryError("much"), "OOM"),
        (RuntimeError("an illegal memory access"), "failed"),
    ],
)
def test_a_check_that_does_not_pass_is_reported(error, status, monkeypatch):
    def fails(*args):
        raise error

    monkeypatch.setitem(stress.KINDS, "reference", fails)
    row = checks.run_check(similarity.Check("reference", "rows", "bf16", 1, 2, 3), "cpu")
    assert row["status"] == status
    assert checks.is_wrong([row]) == (status in ("wrong", "failed"))
    lines = checks.check_failures([row])
    assert len(lines) == (status != "OOM")
    assert all(line.startswith(f"reference: rows, bf16, 1 x 2 x 3, scale 10: {status}, ") for line in lines)
    assert all(line.endswith(str(error)) for line in lines)
    assert f"| reference: rows |  |  | 0 of 1, 1 {status} |" in checks.correctness_table([row])


def test_checks_after_a_lost_gpu_are_not_run(monkeypatch):
    def lost(call):
        raise DeviceLost("an illegal memory access")

    monkeypatch.setattr(checks, "_lost", [])
    monkeypatch.setattr(checks, "attempt", lost)
    rows = [checks.run_check(similarity.Check("reference", "rows", "bf16", n, 2, 3), "cpu") for n in (1, 2)]
    assert [row["status"] for row in rows] == ["failed", "not run"]
    assert "1 x 2 x 3" in rows[1]["detail"]


# Tiles


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


_GROUPS = [
    similarity.Group(k, d, t)
    for k in similarity.TILE_KINDS
    for d in (3, 64, 100, 128, 256, 1024)
    for t in ("bf16", "fp32")
]


@pytest.mark.parametrize("group", _GROUPS, ids=str)
def test_candidates_are_what_kernels_and_launchers_take(group):
    found = similarity.candidates(group)
    assert found[0] == group.shipped()
    assert len(found) == len(set(found)) == 24
    for tile in found:
        for size in (tile.block_m, tile.block_n, tile.block_d, tile.block_out):
            assert size >= 16
            assert size & (size - 1) == 0
        assert tile.block_m % tile.block_n == 0
        if group.dim <= tile.block_d:
            assert tile.block_out == tile.block_d
        assert tile.warps in (4, 8)
        assert 2 <= tile.stages <= 4
    steps = [similarity._steps(tile, found[0]) for tile in found]
    assert steps == sorted(steps)
    assert steps[1] == 1


class Spy:
    """A kernel that notes the blocks of its launches."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def start(*args, **kwargs):
            self.seen.append([kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages")])
            return self.kernel[grid](*args, **kwargs)

        return start


def _blocks(tile):
    return [tile.block_m, tile.block_n, tile.block_d, tile.warps, tile.stages]


@pytest.mark.parametrize("kind", similarity.TILE_KINDS)
def test_a_forced_tile_is_the_one_that_runs(kind, monkeypatch):
    seen = []
    for name in ("lse_fwd_kernel", "lse_bwd_kernel"):
        monkeypatch.setattr(launch, name, Spy(getattr(launch, name), seen))
    group = similarity.Group(kind, 20, "fp32")
    tile = similarity.candidates(group)[3]
    assert similarity.try_tile(similarity.Trial(group, tile), _device(), rows=40) is None
    before = [similarity.Group("forward, symmetric", 20, "fp32").shipped()] if kind.startswith("backward") else []
    assert seen == [_blocks(one) for one in (*before, tile)]


def test_tiles_that_fail_or_give_something_else_are_not_timed():
    a, b, c, d = similarity.candidates(similarity.Group("forward", 64, "bf16"))[:4]

    def call():
        tile = launch.forward_tile(64, torch.bfloat16)
        if tile == c:
            raise RuntimeError("out of resource: shared memory")
        return torch.ones(3) * (1.5 if tile == d else 1)

    tried = {a: None, b: None, c: None, d: None}
    seconds = {a: 3.0, b: 2.0}
    times = similarity.time_tiles(call, tried, lambda call: seconds[launch.forward_tile(64, torch.bfloat16)], 1e-2)
    assert times == {a: {"min": 3.0, "median": 3.0}, b: {"min": 2.0, "median": 2.0}}
    assert tried[a] is tried[b] is None
    assert tried[c] == "RuntimeError: out of resource: shared memory"
    assert tried[d] == "wrong: 5.0e-01 of the norm away from the first"


def test_the_row_of_a_tile_names_the_best_and_its_gain(aot):
    group = similarity.Group("forward", 128, "bf16")
    shipped, other, large = similarity.candidates(group)[:3]
    tried = {shipped: None, other: None, large: "OutOfResources: shared memory"}
    times = {shipped: {"min": 1e-3, "median": 1.2e-3}, other: {"min": 0.9e-3, "median": 1e-3}}
    row = similarity.tile_row(group, 32768, times, tried, aot.CHIPS[1])
    assert row["gain"] == 1.2
    assert row["best"] == vars(other)
    assert row["roofline_seconds"] == pytest.approx(2 * 32768**2 * 128 / 989e12)
    assert row["best_pct_of_roofline"] == pytest.approx(100 * row["roofline_seconds"] / 0.9e-3, rel=1e-2)
    assert row["tried"][2] == {"tile": vars(large), "seconds": None, "fault": "OutOfResources: shared memory"}
    table = similarity.tile_table([row, similarity.tile_row(group, 1, {}, {shipped: "OOM"}, None)])
    assert "| 1.2 | 2 of 3 |" in table
    assert "|  | 0 of 1 |" in table
    json.dumps(row, allow_nan=False)


# Losses


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
            if next(calls) >= 3:
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
        OURS: {"fault": None, "peak_bytes": 2**20, "apart": 0.0},
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
    assert lines[2].endswith(f"| {row['pct_of_roofline']} | 1 | OOM |  | 2.5, 40, differs by 0.2 | 3, 2 |")
    assert len({line.count("|") for line in lines}) == 1


def test_the_table_of_a_row_where_ours_did_not_run():
    race = losses.Race(losses.NT_XENT, losses.Case("B = 4", 4, 128), "bf16", (OURS, "eager"))
    found = {OURS: {"fault": "OOM"}, "eager": {"fault": None, "peak_bytes": 3, "apart": None}}
    row = losses.race_row(race, found, {"eager": [2e-3]}, None)
    (*_, line) = losses.losses_table([row]).splitlines()
    assert line == "| nt_xent | 4 | 128 | bf16 | OOM |  |  |  |  |  |  | 2 ms |  |"
