"""What the parts that hold kernels to their references share: a check becomes a row, and rows a verdict."""

from __future__ import annotations

import re
from typing import Protocol

import torch

from . import DeviceLost, Row, attempt, markdown

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Check(Protocol):
    """A call that raises AssertionError for a kernel that is not right; ``str`` names it."""

    @property
    def kind(self) -> str: ...

    @property
    def use(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    def __call__(self, device: str) -> None: ...


_lost: list[str] = []  # the check after which the GPU answers this process no more
_MISS = re.compile(r"RMS ratio (\S+), allowed (\S+)")
_INACCURATE = 10.0  # times the tolerance; what is wrong is off by more


def run_check(check: Check, device: str = "cuda") -> Row:
    """A row of the report; ``status`` is right, inaccurate, wrong, OOM, failed or not run, ``detail`` a line."""
    row = {"check": str(check), "kind": check.kind, "use": check.use, "dtype": check.dtype}
    if _lost:
        return row | {"status": "not run", "detail": f"the GPU was lost to this process in {_lost[0]}"}
    try:
        _, fault = attempt(lambda: check(device))
    except DeviceLost as error:
        _lost.append(str(check))
        return row | {"status": "failed", "detail": f"{error}; the GPU answers no more"}
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
    """A line for each that is not right; too little memory is no fault of the kernels."""
    return [f"{r['check']}: {r['status']}, {r['detail']}" for r in rows if r["status"] not in ("right", "OOM")]


def is_wrong(rows: list[Row]) -> bool:
    """Whether there is more than inaccuracy, which is to be looked at but not a reason to time nothing."""
    return any(row["status"] not in ("right", "OOM", "inaccurate") for row in rows)


def correctness_table(rows: list[Row]) -> str:
    """How many of the checks were right, by kind and use and type."""
    places = sorted({(row["kind"], row["use"]) for row in rows})

    def cell(place: tuple[str, str], dtype: str) -> str | None:
        found = [r["status"] for r in rows if (r["kind"], r["use"], r["dtype"]) == (*place, dtype)]
        others = [f", {found.count(status)} {status}" for status in sorted({*found} - {"right"})]
        return f"{found.count('right')} of {len(found)}" + "".join(others) if found else None

    body = [[f"{kind}: {use}", *(cell((kind, use), dtype) for dtype in DTYPES)] for kind, use in places]
    return markdown(["right", *DTYPES], body)
