"""Test the checks of the kernels and the search for tiles in Triton's interpreter."""

import pytest
import torch

from bench.gpu import DeviceLost, checks, prototypes, similarity, views
from fasttrain.kernels.similarity import launch  # before bench/kernels/aot.py, which has its kernels compiled
from tests.kernels.prototypes import stress as prototype_stress
from tests.kernels.similarity import stress, uses
from tests.kernels.tolerances import assert_close
from tests.pipelines.photometric import stress as view_stress

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_CHECK = similarity.Check("reference", "rows", "bf16", 1, 2, 3)


@pytest.mark.parametrize(
    ("module", "kinds"),
    [(similarity, stress.KINDS), (prototypes, prototype_stress.KINDS), (views, {"photometric"})],
    ids=["similarity", "prototypes", "views"],
)
def test_checks_are_distinct_and_of_every_kind(module, kinds):
    grid = module.checks()
    assert len(set(map(str, grid))) == len(grid)
    assert {check.kind for check in grid} == set(kinds)


def test_similarity_checks_cover_every_path():
    grid = similarity.checks()
    names = {dtype: name for name, dtype in checks.DTYPES.items()}
    for use, dtype in uses.uses_and_types(torch.float32, torch.float16, torch.bfloat16):
        reference = [c for c in grid if (c.kind, c.use, c.dtype) == ("reference", use, names[dtype])]
        assert {c.unit_norm and c.scale <= 40 for c in reference} == {True, False}  # bounded, running maximum
        assert max(c.d for c in reference) == 2048
        assert max(c.n for c in reference) == max(c.m for c in reference) == 4097
    assert {c.use for c in grid if c.kind == "same bits"} == set(uses.USES)
    assert max(c.n * c.d for c in grid if c.kind.startswith("offsets")) > 2**31
    tallest = max(c.n for c in grid if c.kind == "several blocks of rows")
    assert tallest > launch._MOST_SLOTS * similarity.Group("forward, symmetric", 128, "bf16").shipped().block_m


def test_other_checks_cover_every_use_type_and_center():
    reference = {(c.use, c.dtype, c.center) for c in prototypes.checks() if c.kind == "reference"}
    centers = {
        use: prototype_stress.CENTERS if use in prototype_stress.TAUGHT else ("none",) for use in prototype_stress.USES
    }
    assert reference == {(use, dtype, c) for use, cs in centers.items() for dtype in checks.DTYPES for c in cs}
    grid = {(c.use, c.dtype) for c in views.checks()}
    assert grid == {(use, dtype) for use in view_stress.USES for dtype in checks.DTYPES}


@pytest.mark.parametrize(
    "check",
    [
        similarity.Check("reference", "both directions", "fp16", 17, 33, 20),
        *(views.Check("everything", dtype, 3, 9) for dtype in checks.DTYPES),
        *(
            prototypes.Check("reference", use, "bf16", (3, 2, 3, 19, 20), prototypes.one_center(use))
            for use in prototype_stress.USES
        ),
    ],
    ids=str,
)
def test_check_of_a_right_kernel_passes(check):
    row = checks.run_check(check, _DEVICE)
    assert (row["status"], row["detail"]) == ("right", None)


def test_check_of_a_wrong_kernel_fails(monkeypatch):
    right = view_stress.finish
    monkeypatch.setattr(view_stress, "finish", lambda *inputs, out: (right(*inputs, out=out), out[0].add_(1)))
    assert checks.run_check(views.Check("everything", "fp32", 3, 9), _DEVICE)["status"] == "wrong"


def _error_of(times):
    """Return the error of the project's comparison for a result that is ``times`` tolerances away."""
    with pytest.raises(AssertionError) as error:
        assert_close(torch.ones(3) * (1 + times * 2e-6), torch.ones(3), torch.float32, 1.0, "rows, dx")
    return error.value


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (_error_of(3), "inaccurate"),
        (_error_of(300), "wrong"),
        (AssertionError("rows, dx: NaN in other places"), "wrong"),
        (AssertionError("rows, dx: RMS ratio nan, allowed 2.0e-06"), "wrong"),
        (torch.OutOfMemoryError("much"), "OOM"),
        (RuntimeError("an illegal memory access"), "failed"),
    ],
)
def test_check_that_raises_is_reported(error, status, monkeypatch):
    def fails(*args):
        raise error

    monkeypatch.setitem(stress.KINDS, "reference", fails)
    row = checks.run_check(_CHECK, "cpu")
    assert row["status"] == status
    assert checks.is_wrong([row]) == (status in ("wrong", "failed"))
    lines = checks.check_failures([row])
    assert len(lines) == (status != "OOM")
    assert all(line.startswith(f"{_CHECK}: {status}, ") and line.endswith(str(error)) for line in lines)
    assert f"| reference: rows |  |  | 0 of 1, 1 {status} |" in checks.correctness_table([row])


def test_checks_after_a_lost_gpu_are_not_run(monkeypatch):
    def lost(call):
        raise DeviceLost("an illegal memory access")

    monkeypatch.setattr(checks, "_lost", [])
    monkeypatch.setattr(checks, "attempt", lost)
    rows = [checks.run_check(_CHECK, "cpu") for _ in range(2)]
    assert [row["status"] for row in rows] == ["failed", "not run"]
    assert str(_CHECK) in rows[1]["detail"]


@pytest.mark.parametrize("dim", [3, 100, 128, 1024])
@pytest.mark.parametrize("kind", similarity.TILE_KINDS)
def test_candidates_are_the_shipped_tile_and_neighbours(kind, dim):
    group = similarity.Group(kind, dim, "bf16")
    tiles = similarity.candidates(group)
    assert tiles[0] == group.shipped()
    assert 4 <= len(set(tiles)) == len(tiles) <= 14
    sizes = [size for t in tiles for size in (t.block_m, t.block_n, t.block_d, t.block_out)]
    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    assert all(t.block_m % t.block_n == 0 and (dim > t.block_d or t.block_out == t.block_d) for t in tiles)
    steps = [similarity._steps(tile, tiles[0]) for tile in tiles]
    assert steps == sorted(steps)


@pytest.mark.parametrize("kind", similarity.TILE_KINDS)
def test_forced_tile_is_launched(kind, monkeypatch):
    launches = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def start(*args, **options):
                names = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages")
                launches.append([options[name] for name in names])
                return self.kernel[grid](*args, **options)

            return start

    for name in ("row_lse_kernel", "both_lse_kernel", "weighted_sum_kernel"):
        monkeypatch.setattr(launch, name, Spy(getattr(launch, name)))
    group = similarity.Group(kind, 20, "fp32")
    tile = similarity.candidates(group)[3]
    assert similarity.try_tile(similarity.Trial(group, tile), _DEVICE, rows=40) is None
    before = [similarity.Group("forward, symmetric", 20, "fp32").shipped()] if kind.startswith("backward") else []
    assert launches == [[t.block_m, t.block_n, t.block_d, t.warps, t.stages] for t in (*before, tile)]


def test_tiles_that_fail_or_differ_are_not_timed():
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
    assert tried[d].startswith("wrong: 5.0e-01 ")
