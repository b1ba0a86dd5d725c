"""The console script: ``fasttrain train ...`` and ``fasttrain doctor``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_USAGE = """usage: fasttrain COMMAND ...

  train    train a backbone (the flags of fasttrain/run.py; fasttrain train --help)
  doctor   say what is installed, what stands in for what is not, and how to mend it"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Dispatch to a command; returns the exit status."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command == "train":
        from .run import main as train

        return train(rest)
    if command == "doctor":
        from .doctor import main as doctor

        return doctor()
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    print(f"fasttrain: command {command!r} is unknown; choose train or doctor", file=sys.stderr)
    return 2
