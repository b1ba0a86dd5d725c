"""Compare the losses with their peers on a GPU: seconds, peak memory, and percent of the roofline for ours.

A row is one operation at one size in one type: a forward and backward pass by every contestant in turn, from the same
tensors. Times are by the GPU's clock, and the GPU is busy until all kernels are launched. ``host`` is the time of the
launches, which is the least time of a program that does nothing else. In bf16 the tensors are as from a network under
autocast, and the loss runs under autocast too. In fp32 everything is fp32. ``apart`` is the distance of a contestant's
loss or gradients from ours. It is rounding, which is large for peers that store logits in bf16. torch.compile comes
last, in rows of its own, because it takes seconds per size.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.peers import OURS, Case, Operation, Step, distances
from bench.peers.similarity import BIDIRECTIONAL, INFO_NCE, INFO_NCE_QUEUE, NT_XENT, VMF_ENTROPY

from . import Row, Run, attempt, markdown, milliseconds, percent, roofline_seconds

COMPILED = "torch.compile"
PEERS = ("lightly", "inf-cl", "eager")  # contestants without memory between two calls come first
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DIMS = (128, 256)
BATCHES = (4096, 32768, 65536, 1024, 8192, 16384, 256)  # the most important first, in case time runs out
QUEUE = (256, 65536)

_SECONDS = 1.0  # for the rounds of a row, but at least three rounds
_APART = {"bf16": 0.1, "fp32": 1e-2}  # beyond it a contestant differs; tf32 alone explains 1e-3


@dataclass(frozen=True)
class Work:
    """Rows and columns of the scores, and the products and exponentials per score of our passes."""

    rows: int
    columns: int
    forward: tuple[float, float]
    backward: tuple[float, float]


def work(operation: str, batch: int, columns: int) -> Work:
    """Return the work of an operation. Half of symmetric scores is computed; a queue has no gradient."""
    if operation in ("nt_xent", "vmf_entropy"):
        rows = 2 * batch if operation == "nt_xent" else batch
        return Work(rows, rows, (0.5, 0.5), (2, 1))
    if operation == "info_nce_queue":
        return Work(batch, columns, (1, 1), (2, 1))
    return Work(batch, batch, (1, 1), (4, 2))


@dataclass(frozen=True)
class Race:
    """One operation at one size with its contestants."""

    operation: Operation
    case: Case
    dtype: str
    contestants: tuple[str, ...]

    def __str__(self) -> str:
        others = ", ".join(self.contestants[1:])
        return f"{self.operation.name}, {self.case.name}, {self.dtype}: {others}"


def races() -> list[Race]:
    """Return the whole grid, the most important first, then the grid again for torch.compile."""
    grid = []
    for compiled in (False, True):
        for dtype, kind in TYPES.items():
            for dim in DIMS:
                sizes = [(QUEUE, (INFO_NCE_QUEUE,))]
                sizes += [((batch, 0), (NT_XENT, VMF_ENTROPY, BIDIRECTIONAL, INFO_NCE)) for batch in BATCHES]
                for (batch, columns), operations in sizes:
                    name = f"B = {batch}" + (f", Q = {columns}" if columns else "") + f", D = {dim}"
                    case = Case(name, batch, dim, columns, device="cuda", dtype=kind)
                    for operation in operations:
                        peers = [COMPILED] if compiled else [peer for peer in PEERS if peer in operation.contestants]
                        grid.append(Race(operation, case, dtype, (OURS, *peers)))
    return grid


def losses(run: Run) -> None:
    run_races(run, races(), roofs)


def run_races(run: Run, races: list[Race], roofs: Callable[[Race, Any], dict[str, float | None]]) -> None:
    """Add a row for every race for which there is time."""
    clock = measure.DeviceClock()
    for race in run.in_time(races):
        run.add(race_row(race, *run_race(race, clock.seconds), run.chip, roofs))
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


Times = dict[str, list[float]]


def run_race(race: Race, seconds: Callable[[Step], float]) -> tuple[dict[str, Row], Times]:
    """Return memory, distance from ours and fault of every contestant, and times of contestants without a fault."""
    inputs = race.operation.draw(race.case)
    results: dict[str, Row] = {}
    steps: dict[str, Callable[[], Any]] = {}
    expected = None
    for name in race.contestants:
        started, fault = attempt(partial(_start, race, name, inputs))
        results[name] = {"fault": fault and fault.removeprefix("NotRun: ")}
        if started is None:
            continue
        steps[name], outputs, results[name]["peak_bytes"], results[name]["host_seconds"] = started
        expected = outputs if name == OURS else expected
        results[name]["apart"] = None if expected is None else _largest(distances(outputs, expected))
        del started, outputs
    if OURS in steps and COMPILED not in race.contestants:
        steps |= attempt(partial(_passes, race, inputs))[0] or {}
    faults: dict[str, str] = {}

    def timed(name: str) -> float:
        if name in faults:
            return math.nan
        time, fault = attempt(partial(seconds, steps[name]))
        if fault is not None:
            faults[name] = fault
        return math.nan if time is None else time

    rounds = measure.in_turn([partial(timed, name) for name in steps], fewest=3, most=30, seconds=_SECONDS)
    for name, fault in faults.items():
        results.setdefault(name, {})["fault"] = fault
    return results, {name: times for name, times in zip(steps, rounds, strict=True) if name not in faults}


def _start(race: Race, name: str, inputs: tuple[Tensor, ...]) -> tuple[Step, tuple[Tensor, ...], int, float]:
    """Return a contestant's step and outputs, and its peak memory and launch time after compilation."""
    step = race.operation.step(name, race.case, inputs, wait=False)
    outputs = step()
    peak = measure.peak_bytes(step, race.case.device)
    return step, outputs, peak, float(f"{measure.host_seconds(step):.3g}")


def _passes(race: Race, inputs: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """Return our forward and backward pass separately."""
    loss = race.operation.loss(OURS, race.case, inputs)
    value, leaves = loss(), [x for x in inputs if x.requires_grad]
    return {"forward": loss, "backward": lambda: torch.autograd.grad(value, leaves, retain_graph=True)}


def _largest(values: list[float]) -> float | None:
    """Return the largest value, or None for NaN, which JSON does not have."""
    return None if any(math.isnan(value) for value in values) else float(f"{max(values):.3g}")


def roofs(race: Race, chip: Any) -> dict[str, float | None]:
    """Return the roofline of our forward and backward pass in seconds."""
    case = race.case
    needed = work(race.operation.name, case.rows, case.columns)
    scores = needed.rows * needed.columns
    return {
        name: roofline_seconds(chip, scores, case.dim, race.dtype, products=products, exps=exps)
        for name, (products, exps) in (("forward", needed.forward), ("backward", needed.backward))
    }


def race_row(
    race: Race,
    results: dict[str, Row],
    times: Times,
    chip: Any,
    roofs: Callable[[Race, Any], dict[str, float | None]] = roofs,
) -> Row:
    """Return the row of the report. A ratio is the median of the contestant's seconds divided by ours."""
    case = race.case
    row: Row = {"operation": race.operation.name, "batch": case.rows, "columns": case.columns, "dim": case.dim}
    row |= {"dtype": race.dtype, "contestants": {}}
    for name in race.contestants:
        one = {"seconds": None, "ratio": None, "peak_bytes": None, "apart": None} | results[name]
        if name in times:
            one["seconds"] = measure.least_and_median(times[name])
            if OURS in times:
                ratios = [theirs / ours for theirs, ours in zip(times[name], times[OURS], strict=True)]
                one["ratio"] = float(f"{statistics.median(ratios):.4g}")
            one["rounds"] = len(times[name])
            one["differs"] = one["apart"] is None or one["apart"] > _APART[race.dtype]
        row["contestants"][name] = one
    least = roofs(race, chip)
    for name, seconds in least.items():
        if name in times:
            row[f"{name}_seconds"] = measure.least_and_median(times[name])
            row[f"{name}_pct_of_roofline"] = percent(seconds, row[f"{name}_seconds"]["min"])
    total = None if chip is None else least["forward"] + least["backward"]
    ours = row["contestants"][OURS]["seconds"]
    return row | {"roofline_seconds": total, "pct_of_roofline": percent(total, ours and ours["min"])}


_OURS = ("ours, ms: min / median", "forward", "backward", "% of roof", "host, ms", "peak, MiB")
_HEAD = ("loss", "B", "D", "type", *_OURS)  # then a cell per peer


def losses_table(rows: list[Row], names: tuple[str, ...] = (*PEERS, COMPILED)) -> str:
    """Return a table with one line per size. The row of torch.compile joins the row of the other peers."""
    lines: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("operation", "batch", "columns", "dim", "dtype"))
        ours = row["contestants"][OURS]
        if key not in lines:
            batch = f"{row['batch']} x {row['columns']}" if row["columns"] else row["batch"]
            line = [row["operation"], batch, row["dim"], row["dtype"]]
            passes = [milliseconds(row.get(f"{name}_seconds", {}).get("min")) for name in ("forward", "backward")]
            line += [_time(ours), *passes, row["pct_of_roofline"], milliseconds(ours.get("host_seconds"))]
            line += [_mebibytes(ours["peak_bytes"])]
            lines[key] = [*line, *[None] * len(names)]
        for name in names:
            if name in row["contestants"]:
                lines[key][len(_HEAD) + names.index(name)] = _against(row["contestants"][name], ours)
    return markdown([*_HEAD, *(f"{name}: time, memory by ours" for name in names)], lines.values())


def _time(one: Row) -> str | None:
    return one["fault"] or f"{milliseconds(one['seconds']['min'])} / {milliseconds(one['seconds']['median'])}"


def _against(one: Row, ours: Row) -> str:
    if one["fault"]:
        return str(one["fault"]).partition(";")[0]
    if one["ratio"] is None:
        return f"{milliseconds(one['seconds']['median'])} ms"
    memory = f"{one['peak_bytes'] / ours['peak_bytes']:.3g}" if ours["peak_bytes"] else "-"
    return f"{one['ratio']:.3g}, {memory}" + (f", differs by {one['apart']}" if one["differs"] else "")


def _mebibytes(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**20:.4g}"
