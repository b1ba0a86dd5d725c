"""The console script: ``fasttrain train ...``, ``fasttrain report`` and ``fasttrain doctor``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_USAGE = """usage: fasttrain COMMAND ...

  train    train a backbone (the flags of fasttrain/run.py; fasttrain train --help)
  report   --views: a contact sheet of the views that a training with these flags would see
  doctor   say what is installed, what stands in for what is not, and how to mend it"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Dispatch to a command; returns the exit status."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command == "train":
        from .run import main as train

        return train(rest)
    if command == "report":
        return _report(rest)
    if command == "doctor":
        from .doctor import main as doctor

        return doctor()
    if command in ("-h", "--help"):
        print(_USAGE)
        return 0
    print(f"fasttrain: command {command!r} is unknown; choose train, report or doctor", file=sys.stderr)
    return 2


def _report(rest: list[str]) -> int:
    if "--views" not in rest:
        print("fasttrain: report needs --views, and a training's flags beside it", file=sys.stderr)
        return 2
    from .distributed import prepare_environment

    prepare_environment()
    from .config import ConfigError
    from .pipelines import DataError
    from .report.views import main as views

    try:
        return views([word for word in rest if word != "--views"])
    except (ConfigError, DataError) as error:
        print(f"fasttrain: {error}", file=sys.stderr)
        return 2
