"""Settings as typed dataclass fields, each with the sentence that ``--help`` prints."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def flag(default: Any, help: str) -> Any:
    """A dataclass field that is also a command-line flag of the same name."""
    return field(default=default, metadata={"help": help})
