"""The JSON file of ``--output``, shared by eval and plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file, and its folder if that is missing. Raise ConfigError if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}.") from None
