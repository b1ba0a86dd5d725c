"""The command ``fasttrain``: one module per sub-command, and what all of them share."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..errors import printable
from .streams import lossy_output

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


_SILENT = {"-h", "--help", "--print_config", "--print-config", "list"}
"""Arguments of ``train`` that print a page for a person or a program to read, without a line before it."""


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
    with lossy_output():
        return _run(command, arguments)


def _run(command: str, arguments: Sequence[str]) -> int:
    from ..distributed.world import World, keep_freed_memory, prepare_environment
    from ..errors import ConfigError, DataError

    try:
        prepare_environment()
        keep_freed_memory()
        _end_quickly()
        slow = command == "train" and sys.modules.get("torch") is None
        if slow and World.from_environment().is_main and _SILENT.isdisjoint(arguments):
            print("fasttrain: loading torch and DeepSpeed", flush=True)
        with _leaving_on_sigint():
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
    except KeyboardInterrupt:
        return fail("stopped by SIGINT", 130) if World.from_environment().is_main else 130


def _end_quickly() -> None:
    """Leave out the search for garbage at the end of the process. Over torch and DeepSpeed it takes 2 to 3 seconds."""
    atexit.unregister(gc.freeze)  # a process may run several commands
    atexit.register(gc.freeze)


@contextmanager
def _leaving_on_sigint() -> Iterator[None]:
    """End the process at Ctrl-C. An exception in the middle of an import may be taken for a missing package."""

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"fasttrain: stopped by SIGINT\n")
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def fail(message: str, status: int = 2) -> int:
    """Print one line on stderr; return the exit status."""
    print(f"fasttrain: {printable(message)}", file=sys.stderr)
    return status


def _missing(command: str, error: ModuleNotFoundError) -> int:
    if (error.name or "fasttrain").startswith("fasttrain"):
        raise error
    extra = "export" if (error.name or "").startswith("onnx") else "train"
    return fail(
        f"fasttrain {command} needs {error.name}, which is not installed. "
        f"Install it with: pip install 'fasttrain[{extra}]'"
    )
