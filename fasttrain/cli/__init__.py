"""The console script: ``fasttrain train ...``, ``fasttrain eval ...`` and the others of the table below."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_COMMANDS = {
    "train": ("fasttrain.run", "train a backbone (the flags of fasttrain/run.py; fasttrain train --help)"),
    "plan": (
        "fasttrain.plan",
        "say what a run will need, without a GPU: memory, traffic, time; takes the flags of train",
    ),
    "eval": (
        "fasttrain.cli.eval",
        "k-NN, linear probe, few-shot, RankMe and more, of a run, an export or a timm model",
    ),
    "export": ("fasttrain.cli.export", "take a network elsewhere: timm, Hugging Face, ONNX, facebookresearch/dino"),
    "report": (
        "fasttrain.cli.report",
        "a page of one run or several (report.html); with --views, what views a training would see",
    ),
    "doctor": ("fasttrain.cli.doctor", "say what is installed, what stands in for what is not, and how to mend it"),
}
"""Name of a command: the module whose ``main`` takes its arguments, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Dispatch to a command; returns the exit status."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: fasttrain COMMAND ...\n")
        print("\n".join(f"  {name:9}{help}" for name, (_, help) in _COMMANDS.items()))
        return 0
    if command not in _COMMANDS:
        *others, last = _COMMANDS
        print(f"fasttrain: command {command!r} is unknown; choose {', '.join(others)} or {last}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(_COMMANDS[command][0]).main(rest)
    return status
