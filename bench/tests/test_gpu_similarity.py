"""bench/gpu's checks of the similarity kernels and its search for tiles, with the interpreter in place of a GPU."""

import json

import pytest
import torch

from bench.gpu import DeviceLost, checks, similarity
from fasttrain.kernels.similarity import launch  # before bench/kernels/aot.py, which has its kernels compiled
from tests.kernels.similarity import stress, uses
from tests.kernels.tolerances import assert_close


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"


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
    assert 4 <= len(set(found)) == len(found) <= 14
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
