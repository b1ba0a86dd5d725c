"""Run checks of kernels against their references: a check becomes a row, and rows become failures and a table."""

from __future__ import annotations

import re
from typing import Protocol

import torch

from . import DeviceLost, Row, attempt, markdown

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Check(Protocol):
    """A call that raises AssertionError if a kernel is wrong. ``str`` returns its name."""

    @property
    def kind(self) -> str: ...

    @property
    def use(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def __call__(self, device: str) -> None: ...


_lost: list[str] = []  # the check after which the GPU no longer responds in this process
_MISS = re.compile(r"RMS ratio (\S+), allowed (\S+)")
_INACCURATE = 10.0  # times the tolerance; beyond it a result is wrong


def run_check(check: Check, device: str = "cuda") -> Row:
    """Return a row of the report.

    ``status`` is right, inaccurate, wrong, OOM, failed or not run. ``detail`` is one line.
    """
    row = {"check": str(check), "kind": check.kind, "use": check.use, "dtype": check.dtype}
    if _lost:
        return row | {"status": "not run", "detail": f"this process lost the GPU in {_lost[0]}"}
    try:
        _, fault = attempt(lambda: check(device))
    except DeviceLost as error:
        _lost.append(str(check))
        return row | {"status": "failed", "detail": f"{error}; the GPU no longer responds"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the other workers need memory too
    return row | dict(zip(("status", "detail"), _status(fault), strict=True))


def _status(fault: str | None) -> tuple[str, str | None]:
    if fault is None or fault == "OOM":
        return fault or "right", None
    kind, _, detail = fault.partition(": ")
    if kind != "AssertionError":
        return "failed", fault
    miss = _MISS.search(detail)
    small = miss is not None and float(miss[1]) <= _INACCURATE * float(miss[2])
    return "inaccurate" if small else "wrong", detail


def check_failures(rows: list[Row]) -> list[str]:
    """Return a line per check that is not right. OOM is not a failure of the kernels."""
    return [f"{r['check']}: {r['status']}, {r['detail']}" for r in rows if r["status"] not in ("right", "OOM")]


def is_wrong(rows: list[Row]) -> bool:
    """Return whether a check failed by more than inaccuracy, which does not prevent the timing."""
    return any(row["status"] not in ("right", "OOM", "inaccurate") for row in rows)


def correctness_table(rows: list[Row]) -> str:
    """Return a table of the numbers of right checks by kind, use and type."""
    places = sorted({(row["kind"], row["use"]) for row in rows})

    def cell(place: tuple[str, str], dtype: str) -> str | None:
        statuses = [r["status"] for r in rows if (r["kind"], r["use"], r["dtype"]) == (*place, dtype)]
        others = [f", {statuses.count(status)} {status}" for status in sorted({*statuses} - {"right"})]
        return f"{statuses.count('right')} of {len(statuses)}" + "".join(others) if statuses else None

    body = [[f"{kind}: {use}", *(cell((kind, use), dtype) for dtype in DTYPES)] for kind, use in places]
    return markdown(["right", *DTYPES], body)
