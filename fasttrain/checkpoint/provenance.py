"""Where a checkpoint comes from: the configuration, the code and the libraries that made it."""

from __future__ import annotations

import hashlib
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from ..config.resolve import Config

_WHERE = ("output_dir", "resume", "limit_steps", "num_workers")
"""Settings that do not decide what a run computes."""


def provenance(config: Config) -> dict[str, str | None]:
    """``config`` (a hash of what decides the run), ``commit`` (None outside of git), ``torch`` and ``deepspeed``."""
    return {
        "config": config_hash(config),
        "commit": git_commit(Path(__file__).resolve().parent),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }


def config_hash(config: Config) -> str:
    """16 hexadecimal digits of the SHA-256 of everything that decides the run; where it is written does not."""
    flat = yaml.safe_load(config.with_absolute_paths().to_yaml())
    decides = {name: value for name, value in flat.items() if name not in _WHERE}
    return hashlib.sha256(yaml.safe_dump(decides, sort_keys=True).encode()).hexdigest()[:16]


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out, with ``-dirty`` where tracked files differ; None if ``folder`` is not in git.

    An installed package lies in an environment, which may itself be inside of someone's repository: only a repository
    that tracks ``folder`` counts.
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
