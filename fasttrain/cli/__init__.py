"""The command ``fasttrain``: one module per sub-command, and what all of them share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_COMMANDS = {
    "train": "train a backbone (also: deepspeed fasttrain/run.py ...)",
    "plan": "predict memory, traffic and time of a run, without a GPU; takes the flags of train",
    "eval": "evaluate a run, an export or a timm model: k-NN, linear probe, few-shot, RankMe and more",
    "export": "write a network for timm, Hugging Face, ONNX or facebookresearch/dino",
    "report": "write a page about one run or several (report.html)",
    "views": "draw the views that a training would see (views.png); takes the flags of train",
    "doctor": "report what is installed, what replaces missing packages, and how to fix it",
}
"""The name of a sub-command, which is also the name of its module here, and its description."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; return the exit status.

    0 finished; 1 unforeseen error; 2 invalid input (one line on stderr); 3 diverged or collapsed; 128 + n after signal
    n.
    """
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: fasttrain COMMAND ...\n")
        print("\n".join(f"  {name:9}{description}" for name, description in _COMMANDS.items()))
        return 0
    if command not in _COMMANDS:
        *others, last = _COMMANDS
        return fail(f"command {command!r} is unknown. Choose {', '.join(others)} or {last}.")
    return run(command, rest)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run a sub-command in a prepared environment; turn invalid input and missing packages into one line."""
    from ..distributed.world import World, keep_freed_memory, prepare_environment
    from ..errors import ConfigError, DataError

    try:
        prepare_environment()
        keep_freed_memory()
        module = importlib.import_module(f".{command}", __package__)
    except ModuleNotFoundError as error:
        return _missing(command, error)
    except ConfigError as error:
        return fail(str(error))
    try:
        status: int = module.main(arguments)
        return status
    except ModuleNotFoundError as error:
        return _missing(command, error)
    except (ConfigError, DataError) as error:
        return fail(str(error)) if World.from_environment().is_main else error.status


def fail(message: str, status: int = 2) -> int:
    """Print one line on stderr; return the exit status."""
    print(f"fasttrain: {message}", file=sys.stderr)
    return status


def _missing(command: str, error: ModuleNotFoundError) -> int:
    if (error.name or "fasttrain").startswith("fasttrain"):
        raise error
    extra = "export" if (error.name or "").startswith("onnx") else "train"
    return fail(
        f"fasttrain {command} needs {error.name}, which is not installed. "
        f"Install it with: pip install 'fasttrain[{extra}]'"
    )
