"""The trainer's command: ``deepspeed fasttrain/run.py --method dino --entropy``; also for torchrun and python."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

# A script's folder comes first on sys.path. Here that would hide other projects' packages named kernels, report etc.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``fasttrain train``; return the exit status."""
    try:
        from fasttrain.cli import run
    except ModuleNotFoundError as error:
        if error.name != "fasttrain":
            raise
        print("fasttrain: is not installed here. Install it with: pip install -e '.[train]'", file=sys.stderr)
        return 2
    return run("train", sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
