"""Check the kernels with prototypes on a GPU, and compare DINO's loss with its peers.

The checks compare every use of tests/kernels/prototypes/stress.py with the fp64 reference, in every type and with every
kind of centre. Memory that a kernel must write contains NaN before. Sinkhorn has no kernel of its own, but is checked
too. losses.py runs the races: DINO's class tokens with 10 student and 2 teacher views, and 8,192 patches per side. A
view is not compared with itself, so the patches are two views of 4,096.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.peers import OURS, Case, Operation
from bench.peers.prototypes import DINO, features_and_prototypes
from tests.kernels.prototypes import stress
from tests.kernels.similarity.stress import poisoned_memory

from . import Row, Run
from . import losses as shared
from .checks import DTYPES, run_check
from .losses import COMPILED, TYPES, Race, run_races

# Checks

Shape = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Check:
    """One call of a function in ``stress.KINDS``."""

    kind: str
    use: str
    dtype: str
    shape: Shape
    center: str = "none"

    def __str__(self) -> str:
        views, teachers, batch, count, dim = self.shape
        rows = f"{views} + {teachers} views of {batch}, K = {count}, D = {dim}"
        return f"{self.kind}: {self.use}, {self.dtype}, {rows}, center {self.center}"

    def __call__(self, device: str) -> None:
        with poisoned_memory():
            stress.KINDS[self.kind](self.use, self.shape, DTYPES[self.dtype], self.center, device)


_SHAPES: tuple[Shape, ...] = (  # student views, teacher views, images, prototypes, features; slow shapes first
    (10, 2, 16, 65537, 256),
    (8, 2, 256, 3000, 128),
    (2, 2, 100, 4097, 1024),
    (4, 3, 500, 257, 64),
    (10, 2, 64, 1000, 256),
    (1, 2, 33, 999, 384),
    (3, 1, 129, 70, 300),
    (2, 2, 17, 130, 100),
    (2, 1, 7, 3, 3),
)
_REPEATED: tuple[Shape, ...] = ((10, 2, 64, 65536, 256), (8, 2, 500, 3001, 64), (2, 2, 70, 2000, 1024))


def checks() -> list[Check]:
    """Return all checks. Slow checks come first, so that no worker runs one alone at the end."""
    grid = [
        Check("same bits", use, dtype, shape, one_center(use))
        for shape in _REPEATED
        for dtype in ("bf16", "fp32")
        for use in stress.USES
    ]
    for shape in _SHAPES:
        for dtype in DTYPES:
            for use in stress.USES:
                centers = stress.CENTERS if use in stress.TAUGHT else ("none",)
                grid += [Check("reference", use, dtype, shape, center) for center in centers]
    for dtype in DTYPES:
        uses = [use for use in stress.USES if not use.startswith("sinkhorn")]
        grid += [Check("strided rows", use, dtype, (3, 2, 40, 333, 96), one_center(use)) for use in uses]
    return grid


def one_center(use: str) -> str:
    """Return the most demanding kind of centre for a use."""
    return "one a view" if use in stress.TAUGHT else "none"


def correctness(run: Run) -> None:
    for _, row in run.side_by_side(run_check, checks()):
        run.add(row)


# Losses

PEERS = ("lightly", "eager")
_VIEWS = {"dino": (10, 2), "patches": (2, 2)}  # student and teacher
_OPERATIONS = {
    "dino": DINO,
    "patches": Operation(
        name="patches",
        cases=(),
        inputs=partial(features_and_prototypes, views=_VIEWS["patches"][0]),
        contestants=DINO.contestants,
        baseline="lightly",
    ),
}
SIZES = (("dino", 64), ("patches", 4096), ("dino", 16))
_COUNT, _DIM = 65536, 256


def races() -> list[Race]:
    """Return the grid in both types, bf16 first, then the grid again for torch.compile."""
    grid = []
    for compiled in (False, True):
        for dtype, kind in TYPES.items():
            for name, batch in SIZES:
                views, teachers = _VIEWS[name]
                title = f"{views} + {teachers} views of {batch}, K = {_COUNT}, D = {_DIM}"
                case = Case(title, batch, _DIM, _COUNT, device="cuda", dtype=kind)
                grid.append(Race(_OPERATIONS[name], case, dtype, (OURS, *((COMPILED,) if compiled else PEERS))))
    return grid


def roofs(race: Race, chip: Any) -> dict[str, float | None]:
    """Return the roofline of our forward and backward pass in seconds, from bench/kernels/aot.py."""
    from bench.kernels import aot

    case = race.case
    student, teacher = (views * case.rows for views in _VIEWS[race.operation.name])
    size = (student, teacher, case.columns, case.dim, race.dtype)
    return {
        name: None if chip is None else aot.prototype_seconds(chip, *size, passes=(name,))
        for name in ("forward", "backward")
    }


def losses(run: Run) -> None:
    run_races(run, races(), roofs)


def losses_table(rows: list[Row]) -> str:
    return shared.losses_table(rows, (*PEERS, COMPILED))
