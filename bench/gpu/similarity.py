"""Check the log-sum-exp kernels on a GPU, and find the fastest tiles.

The checks compare every use in every type with the fp64 reference, on sizes and scales that reach every path, and run
tests/kernels/similarity/stress.py. Memory that a kernel must write contains NaN before. The search times the shipped
tile and its nearest neighbours in turn. tiles.py is edited by hand from the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import log2
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bench import measure
from fasttrain.kernels import row_logsumexp
from fasttrain.kernels.similarity import launch
from fasttrain.kernels.similarity.tiles import Tile, backward_tile, forward_tile
from tests.kernels.similarity import stress, uses

from . import DeviceLost, Row, Run, attempt, markdown, milliseconds, percent, roofline_seconds
from .checks import DTYPES, run_check

# Checks


@dataclass(frozen=True)
class Check:
    """One call of a function in ``stress.KINDS``."""

    kind: str
    use: str
    dtype: str
    n: int
    m: int
    d: int
    scale: float = 10.0
    unit_norm: bool = True

    def __str__(self) -> str:
        promise = "" if self.unit_norm else ", no unit norm"
        return f"{self.kind}: {self.use}, {self.dtype}, {self.n} x {self.m} x {self.d}, scale {self.scale:g}{promise}"

    def __call__(self, device: str) -> None:
        run, dtype = stress.KINDS[self.kind], DTYPES[self.dtype]
        with stress.poisoned_memory():
            run(self.use, self.n, self.m, self.d, dtype, self.scale, self.unit_norm, device)


_SIZES = (
    (1, 1, 2),
    (17, 130, 100),
    (129, 70, 300),
    (1000, 999, 256),
    (4097, 1000, 64),
    (1024, 4097, 128),
    (333, 257, 2048),
    (1024, 1024, 1024),
)
_SCALES = ((2.0, True), (39.0, True), (10.0, False), (1000.0, True))  # two bounded cases, two with a running maximum


def checks() -> list[Check]:
    """Return all checks. Slow checks come first, so that no worker runs one alone at the end."""
    grid = [Check("offsets beyond 2^31", "rows", "bf16", 1_100_000, 64, 2048)]
    for dtype in ("bf16", "fp32"):
        grid += [Check("several blocks of rows", use, dtype, 20_000, 20_000, 128) for use in stress.LARGE]
        grid += [Check("same bits", use, dtype, 20_000, 9000, 64) for use in stress.LARGE]
        grid += [Check("same bits", use, dtype, 4097, 3000, 128) for use in uses.USES]
        grid += [Check("same bits", "self without own", dtype, 2000, 2000, 1024, 1000.0)]
        grid += [Check("learnt scale, strided rows", use, dtype, 500, 333, 96) for use in stress.LEARNT]
    names = {dtype: name for name, dtype in DTYPES.items()}
    for n, m, d in reversed(_SIZES):
        for use, dtype in uses.uses_and_types(*DTYPES.values()):
            grid += [Check("reference", use, names[dtype], n, m, d, *scale) for scale in _SCALES]
    return grid


def correctness(run: Run) -> None:
    for _, row in run.side_by_side(run_check, checks()):
        run.add(row)


# Tiles


TILE_KINDS = {  # products and exponentials per score
    "forward": (1.0, 1.0),
    "forward, symmetric": (0.5, 0.5),
    "backward, symmetric": (2.0, 1.0),
}
TILE_DIMS = (128, 256, 64, 1024)
TILE_ROWS = {"bf16": 32768, "fp32": 16384}
_MOST_TILES = 14
_SAME = {"bf16": 1e-2, "fp32": 1e-4}  # largest distance of two tiles' results, relative to their norm


@dataclass(frozen=True)
class Group:
    """The kernel, size and type for which one tile is chosen."""

    kind: str
    dim: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.dtype}, D = {self.dim}"

    def shipped(self) -> Tile:
        """Return the shipped tile for this machine's GPU."""
        dtype = DTYPES[self.dtype]
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        capability = 10 * major + minor
        if self.kind.startswith("backward"):
            return backward_tile(self.dim, dtype, capability)
        return forward_tile(self.dim, dtype, capability, columns=self.kind != "forward")


@dataclass(frozen=True)
class Trial:
    """A tile to try."""

    group: Group
    tile: Tile

    def __str__(self) -> str:
        return f"{self.group}, {show(asdict(self.tile))}"


def candidates(group: Group, most: int = _MOST_TILES) -> list[Tile]:
    """Return the shipped tile, then its nearest neighbours by factors of two that may fit into the registers."""
    shipped = group.shipped()
    accumulated = shipped.block_out if group.kind.startswith("backward") else 0  # columns next to the scores
    neighbours = [
        replace(shipped, block_m=block_m, block_n=block_n, warps=warps, stages=stages)
        for block_m in (64, 128, 256)
        for block_n in (32, 64, 128)
        for warps in (4, 8)
        for stages in (2, 3)
        if block_m % block_n == 0 and block_m * (block_n + accumulated) <= 128 * 32 * warps  # 128 of 255 registers
    ]
    near = sorted((tile for tile in neighbours if tile != shipped), key=lambda tile: (_steps(tile, shipped), str(tile)))
    return [shipped, *near[: most - 1]]


def _steps(tile: Tile, other: Tile) -> float:
    """Return the distance of two tiles: doublings and halvings of sizes, plus the difference of stages."""
    sizes = [
        (a, b) for (name, a), b in zip(asdict(tile).items(), asdict(other).values(), strict=True) if name != "stages"
    ]
    return sum(abs(log2(a / b)) for a, b in sizes) + abs(tile.stages - other.stages)


@contextmanager
def forced(tile: Tile) -> Iterator[None]:
    """Let the launchers use this tile for every call."""
    with mock.patch.multiple(launch, forward_tile=lambda *a, **k: tile, backward_tile=lambda *a, **k: tile):
        yield


def launcher(group: Group, rows: int, device: str = "cuda") -> Callable[[], Tensor]:
    """Return a call of the tile's kernel on unit rows. For a backward pass the forward pass runs here, untimed."""
    draw = torch.randn(2, rows, group.dim, device=device, generator=torch.Generator(device).manual_seed(0))
    x, y = normalize(draw, dim=2).to(DTYPES[group.dtype]).unbind()
    options: dict[str, Any] = {"scale": 10.0, "unit_norm": True, "backend": "triton"}
    if group.kind == "forward":
        return lambda: row_logsumexp(x, y, **options)
    if group.kind == "forward, symmetric":
        return lambda: row_logsumexp(x, x, exclude_self=True, **options)
    lse, weights = row_logsumexp(x.requires_grad_(), x, exclude_self=True, **options), torch.full((rows,), 1 / rows)
    return partial(_gradient, lse, x, weights.to(device))


def _gradient(lse: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad(lse, x, weights, retain_graph=True)[0]


def try_tile(trial: Trial, device: str = "cuda", rows: int | None = None) -> str | None:
    """Compile and run a tile once. Return its error, or None."""

    def run() -> Tensor:
        call = launcher(trial.group, rows or TILE_ROWS[trial.group.dtype], device)
        with forced(trial.tile):
            return call()

    try:
        return attempt(run)[1]
    except DeviceLost as error:
        return f"{error}; the GPU no longer responds"


def tiles(run: Run) -> None:
    clock = measure.DeviceClock()
    for dtype, rows in TILE_ROWS.items():
        groups = [Group(kind, dim, dtype) for dim in TILE_DIMS for kind in TILE_KINDS]
        trials = [Trial(group, tile) for group in groups for tile in candidates(group)]
        faults = dict(run.side_by_side(try_tile, trials))
        for group in run.in_time(groups):
            tried = {trial.tile: fault for trial, fault in faults.items() if trial.group == group}
            call, fault = attempt(partial(launcher, group, rows))
            if call is None:
                tried = dict.fromkeys(tried, fault)
            times = {} if call is None else time_tiles(call, tried, clock.seconds, _SAME[dtype])
            run.add(tile_row(group, rows, times, tried, run.chip))
            del call
            torch.cuda.empty_cache()


def time_tiles(
    call: Callable[[], Tensor],
    tried: dict[Tile, str | None],
    seconds: Callable[[Callable[[], Tensor]], float],
    same: float,
) -> dict[Tile, dict[str, float]]:
    """Time the tiles that run and agree with the first tile that runs. Write the errors of the others to ``tried``."""
    expected, good = None, []
    for tile in [tile for tile, fault in tried.items() if fault is None]:
        with forced(tile):
            output, tried[tile] = attempt(call)
        if output is None:
            continue
        expected = output if expected is None else expected
        distance = float(torch.linalg.vector_norm(output - expected) / torch.linalg.vector_norm(expected))
        if distance < same:
            good.append(tile)
        else:
            tried[tile] = f"wrong: {distance:.1e} of the norm away from the first"

    def timed(tile: Tile) -> float:
        with forced(tile):
            return seconds(call)

    times = measure.in_turn([partial(timed, tile) for tile in good], fewest=5, most=20, seconds=1.5)
    return {tile: measure.least_and_median(values) for tile, values in zip(good, times, strict=True)}


def tile_row(
    group: Group, rows: int, times: dict[Tile, dict[str, float]], tried: dict[Tile, str | None], chip: Any
) -> Row:
    """Return the row of a group. The best tile has the least median; the gain is shipped by best median."""
    products, exps = TILE_KINDS[group.kind]
    roof = roofline_seconds(chip, rows**2, group.dim, group.dtype, products=products, exps=exps)
    shipped, best = group.shipped(), min(times, key=lambda tile: times[tile]["median"], default=None)
    row: Row = {**asdict(group), "rows": rows, "roofline_seconds": roof, "gain": None}
    if best is not None and shipped in times:
        row["gain"] = float(f"{times[shipped]['median'] / times[best]['median']:.4g}")
    for name, tile in (("shipped", shipped), ("best", best)):
        time = None if tile is None else times.get(tile)
        row[name] = None if tile is None else asdict(tile)
        row[f"{name}_seconds"] = time
        row[f"{name}_pct_of_roofline"] = percent(roof, time and time["min"])
    row["tried"] = [{"tile": asdict(t), "seconds": times.get(t), "fault": fault} for t, fault in tried.items()]
    return row


def show(tile: dict[str, int] | None) -> str | None:
    return tile and "{block_m}x{block_n}x{block_d}, out {block_out}, {warps} warps, {stages} stages".format(**tile)


def tile_table(rows: list[Row]) -> str:
    body = []
    for row in rows:
        line = [f"{row['kind']}, {row['dtype']}, D = {row['dim']}"]
        for name in ("shipped", "best"):
            time = row[f"{name}_seconds"]
            line += [show(row[name]), milliseconds(time and time["median"]), row[f"{name}_pct_of_roofline"]]
        ran = sum(tried["seconds"] is not None for tried in row["tried"])
        body.append([*line, row["gain"], f"{ran} of {len(row['tried'])}"])
    return markdown(["", "shipped", "ms", "% of roof", "best", "ms", "% of roof", "gain", "ran"], body)
