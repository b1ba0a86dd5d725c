"""Settings as typed dataclass fields, each with the sentence that ``--help`` prints and the values that it may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any


def flag(
    default: Any, help: str, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> Any:
    """A dataclass field that is also a command-line flag of the same name.

    A number is at least ``least`` (at most ``most`` too, if that is given), or greater than ``above``.
    """
    return field(default=default, metadata={"help": help, "least": least, "above": above, "most": most})


def demand(value: float, bounds: Mapping[str, Any]) -> str | None:
    """What a flag's metadata asks of its number, in words; None where the number is so."""
    least, above, most = (bounds[name] for name in ("least", "above", "most"))
    if not math.isfinite(value):
        return "a finite number"
    if above is not None and value <= above:
        return f"above {above:g}"
    if (least is not None and value < least) or (most is not None and value > most):
        return f"at least {least:g}" if most is None else f"between {least:g} and {most:g}"
    return None
