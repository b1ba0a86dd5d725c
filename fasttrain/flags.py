"""Settings as typed dataclass fields: the help text of each, its range, and the check of values against both.

A field ``epochs: Count = flag(100, "epochs")`` is a setting in YAML, a keyword in Python and a flag on a command line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from .errors import ConfigError

Count = Annotated[int, Field(ge=1)]
"""An integer of at least 1."""
Several = Annotated[int, Field(ge=2)]
"""An integer of at least 2."""
Natural = Annotated[int, Field(ge=0)]
"""An integer of at least 0."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A finite number above 0."""
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A finite number of at least 0."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Fractions = Annotated[
    tuple[Fraction, ...], BeforeValidator(lambda v: (v,) if isinstance(v, int | float) else v), Field(min_length=1)
]
"""A number from 0 to 1, or several."""
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
"""A number above 0 and at most 1."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""An integer from 0 to 2**63 - 1."""

Sides = Annotated[
    tuple[Count, ...], BeforeValidator(lambda v: (v,) if isinstance(v, int) else v), Field(min_length=1, max_length=2)
]
"""A side in pixels, or height and width."""


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` and ``~name`` expanded, as the shell does it. An unknown user's name stays as it is."""
    return Path(os.path.expanduser(path))


def _single(value: Any) -> Any:
    if isinstance(value, list | tuple) and not value:
        raise ValueError("must not be empty")
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


FilePath = Annotated[Path, AfterValidator(user_path)]
"""A path on this machine, with ``~`` expanded."""
PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""The same as text, for settings that are stored in YAML or that also take a word."""
Paths = Annotated[PathText | tuple[PathText, ...], BeforeValidator(_single)]
"""A path, or several. A list of one is that path."""


def _json_text(value: str) -> str:
    """Return the object in a JSON file, or in a text that is one, as JSON in one form."""
    try:
        text = value if value.lstrip().startswith("{") else user_path(value).read_text()
        content = json.loads(text)
    except OSError as error:
        raise ValueError(f"{value} cannot be read: {error.strerror}. Pass a JSON file.") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}, got {value}. Pass a JSON file.") from None
    if not isinstance(content, dict):
        raise ValueError(f"must hold a JSON object, got {value}. Write it in braces.")
    return json.dumps(content, sort_keys=True)


JsonText = Annotated[str, Field(min_length=1), AfterValidator(_json_text)]
"""A JSON file, or its text. The text is stored, so a run does not depend on the file afterwards."""

_TYPES = ("constrained-", "function-", "tuple[")  # starts of parts of a place that pydantic adds for a union
_PLAIN_TYPES = ("int", "float", "str")
_RANGES = {
    "string_too_short": "must not be empty",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
}

Settings = TypeVar("Settings")


def size_of(values: tuple[int, ...] | None) -> int | tuple[int, int] | None:
    """Return the value of a ``Sides`` flag as the size of a view: a side, (height, width) or None."""
    if values is None or len(values) == 1:
        return values and values[0]
    return values[0], values[1]


def flag(default: Any, help: str) -> Any:
    """Return a dataclass field with a default and the sentence that ``--help`` prints."""
    return field(default=default, metadata={"help": help})


def validated(cls: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Make a settings dataclass from values. Raise ConfigError, which names the flag, for an invalid one."""
    for name, hint in get_type_hints(cls).items():
        if isinstance(values.get(name), bool) and {int, float} & set(_kinds(hint)) and bool not in _kinds(hint):
            raise ConfigError(f"--{name}: must be a number, got {values[name]}")
    try:
        settings: Settings = TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"]]
        place = [part for part in parts if part not in _PLAIN_TYPES and not part.startswith(_TYPES)]
        if first["type"] in _RANGES and place[-1].isdigit():  # a number of several, which the message shows
            place.pop()
        name = ".".join(place)
        text = _RANGES.get(first["type"])
        reason = first["msg"].lower() if text is None else text.format(**first.get("ctx", {}))
        if not name:  # the check of several values together, which names them itself
            raise ConfigError(str(first.get("ctx", {}).get("error", reason))) from None
        if own := first.get("ctx", {}).get("error"):  # a check of our own, which shows the value
            raise ConfigError(f"--{name}: {own}") from None
        raise ConfigError(f"--{name}: {reason}, got {first['input']!r}") from None
    return settings


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the types that a type hint allows."""
    return (hint, *(kind for inner in get_args(hint) for kind in _kinds(inner)))
