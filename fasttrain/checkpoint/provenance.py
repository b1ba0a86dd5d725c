"""The origin of a checkpoint: the configuration, the code and the libraries that made it."""

from __future__ import annotations

import hashlib
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config.resolve import Config, read_yaml
from ..errors import ConfigError

_IRRELEVANT = ("output_dir", "resume", "limit_steps", "num_workers")
"""Settings that do not change the values that a run computes."""


def provenance(config: Config) -> dict[str, str | None]:
    """Return ``config`` (a hash of the settings), ``commit`` (None outside of git), ``torch`` and ``deepspeed``."""
    return {
        "config": config_hash(config),
        "commit": git_commit(Path(__file__).resolve().parent),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }


def config_hash(config: Config) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of all settings that change the run's values."""
    return hashlib.sha256(yaml.safe_dump(_relevant(config), sort_keys=True).encode()).hexdigest()[:16]


def changed_settings(run: Path, config: Config) -> list[str]:
    """Return the settings that change the run's values and differ from its ``config.yaml``, as ``name old -> new``.

    The list is empty if the file cannot be read: a checkpoint may lie alone.
    """
    try:
        stored = read_yaml(run / "config.yaml")
    except ConfigError:
        return []
    differences = {name: value for name, value in _relevant(config).items() if stored.get(name) != value}
    return [
        name if isinstance(value, list) else f"{name} {stored.get(name)} -> {value}"
        for name, value in differences.items()
    ]


def _relevant(config: Config) -> dict[str, Any]:
    flat = yaml.safe_load(config.with_absolute_paths().to_yaml())
    return {name: value for name, value in flat.items() if name not in _IRRELEVANT}


def git_commit(folder: Path) -> str | None:
    """Return the checked-out commit, with ``-dirty`` if tracked files differ, or None if git does not track ``folder``.

    An installed package may lie in an environment inside another project's repository. That repository does not track
    the package, so its commit is not returned.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--", str(folder)):
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
