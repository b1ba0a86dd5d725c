"""Checkpoints: complete or absent. DeepSpeed writes them; they are verified, then published by renaming."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..distributed.world import World, everyone
from ..engine.engine import Engine
from ..errors import ConfigError, SaveError
from ..files import Sum, difference, write_tensors, write_text
from .state import client_state, misfit, place, read, trained_names

_CARD = "fasttrain.json"
_TAG = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Card:
    """What a checkpoint is of, readable without opening its tensors."""

    method: str
    entropy: bool
    arch: str
    optimizer: str
    step: int
    world_size: int
    zero_stage: int
    version: str
    batch: int | None = None
    """Images an optimizer step, all ranks together."""
    origin: dict[str, str | None] = field(default_factory=dict)
    """See :func:`fasttrain.checkpoint.provenance.provenance`."""
    skipped_steps: int = 0
    """Steps that were not finite, up to this one."""
    rollbacks: int = 0
    """How often the order of the data was changed to get past a divergence."""


def publish(engine: Engine, folder: Path, card: Card, *, keep: bool, newest: int | None = None) -> None:
    """Write the state after ``card.step`` steps to ``folder/step-N``, then point ``latest`` at it.

    It is written under another name, read back, and renamed once it is on the disk, so a folder called ``step-N`` is
    always complete. Then older ones go: all but the ``newest`` so many or, without a number, all that are not to be
    kept. Collective: every rank calls it. Raises SaveError on every rank if any of them cannot write.
    """
    world, tag = engine.world, f"step-{card.step:08d}"
    hidden = folder / f".{tag}.part"

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.part"):
            shutil.rmtree(leftover)
        hidden.mkdir()

    def write() -> dict[str, Sum]:
        with _summing(engine.deepspeed) as (files, failures):
            engine.deepspeed.save_checkpoint(
                str(folder), tag=hidden.name, client_state=client_state(engine), save_latest=False
            )
        if failures:
            raise failures[0]
        return files

    def finish() -> None:
        files = {name: total for part in written for name, total in part.items()}
        content = asdict(card) | {"keep": keep, "files": files}
        write_text(hidden / _CARD, json.dumps(content | {"crc32": _crc32(content)}, indent=1))
        if (folder / tag).exists():
            os.replace(folder / tag, folder / f".{tag}.old.part")
        os.replace(hidden, folder / tag)
        write_text(folder / "latest", tag)  # and the folder's names with it
        shutil.rmtree(folder / f".{tag}.old.part", ignore_errors=True)
        for old in _superfluous(folder, tag, newest):
            (old / _CARD).unlink(missing_ok=True)  # first: without it, what is left is no checkpoint
            shutil.rmtree(old, ignore_errors=True)

    try:
        _together(world, prepare if world.is_main else _nothing)
        written: list[dict[str, Sum]] = _together(world, write)
        _together(world, finish if world.is_main else _nothing)
    except SaveError as error:
        if world.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
        last = _complete(folder)
        still = f"{last[-1].name} is the last complete one" if last else "there is none before it"
        raise SaveError(
            f"checkpoint {folder / tag} could not be written ({error}); {still}; "
            "make room, and --resume auto goes on from there"
        ) from None


def _superfluous(folder: Path, tag: str, newest: int | None) -> list[Path]:
    """The checkpoints that go now that ``tag`` is published; what is left of a half-removed one goes too."""
    others = sorted(path for path in folder.glob("step-*") if path.name != tag)
    if newest is None:
        return [path for path in others if not _content(path).get("keep")]
    before = [path for path in others if _content(path) and path.name < tag]
    stay = before[-(newest - 1) :] if newest > 1 else []
    return [path for path in others if path not in stay]


def find(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint folder that ``--resume`` means, or None to start afresh. Raises ConfigError for a wrong path.

    ``latest`` decides, whether what it names is there or not: :func:`choose` looks into it.
    """
    if resume == "never":
        return None
    root = output_dir if resume == "auto" else Path(resume)
    for folder in (root, root / "checkpoints"):
        if (folder / _CARD).is_file():
            return folder
        if (folder / "latest").is_file():
            named = (folder / "latest").read_text(errors="replace").strip()
            return folder / (named if _TAG.fullmatch(named) else "latest")
        if complete := _complete(folder):
            return complete[-1]
    if resume == "auto":
        return None
    raise ConfigError(
        f"--resume {resume}: no checkpoint there; pass a run's folder, one of its checkpoints, auto or never"
    )


def choose(resume: str, output_dir: Path, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, every file of it verified, and lines that say what was passed over.

    With ``auto`` a broken one is passed over for the newest older one that is whole, one that is not there for the
    newest of all; one that was asked for by its path is refused with ConfigError, and so it is if none is whole.
    Collective: the ranks share the reading.
    """
    found = find(resume, output_dir)
    passed: list[str] = []
    candidates = [] if found is None else [found]
    if found is not None and resume == "auto" and found.parent.is_dir():
        others = [path for path in reversed(_complete(found.parent)) if path != found]
        candidates += [path for path in others if path.name < found.name or not found.is_dir()]
    for path in candidates:
        problem = _problem(path, world)
        if problem is None:
            return path, [f"{line}; going on from {path.name}" for line in passed]
        passed.append(f"checkpoint {path} is broken: {problem}")
    if passed:
        raise ConfigError(f"{passed[0]}; choose another or --resume never")
    return None, []


def _problem(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint's files, or None; every rank reads its share of them."""
    content = _content(path)
    if not content:
        there = f"it has no readable {_CARD}" if path.is_dir() else "it names no checkpoint"
        return there if path.exists() else "it is not there"
    mine = sorted(content.get("files", {}).items())[world.rank :: world.size]
    problems = (difference(path / name, Sum(*expected)) for name, expected in mine)
    found = everyone(world, next((problem for problem in problems if problem), None))
    return next((problem for problem in found if problem), None)


def verify(file: Path) -> None:
    """Raise ConfigError where a file of a checkpoint is not what was written, by the sum in the checkpoint's card."""
    expected = _content(file.parent).get("files", {}).get(file.name)
    if expected and (problem := difference(file, Sum(*expected))):
        raise ConfigError(f"checkpoint {file.parent} is broken: {problem}; choose another")


def read_card(path: Path) -> Card:
    """The card of a checkpoint folder. Raises ConfigError if it cannot be read."""
    try:
        content = _read(path)
        known = [f.name for f in fields(Card) if f.name in content or f.default is f.default_factory is MISSING]
        return Card(**{name: content[name] for name in known})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"checkpoint {path} has no readable {_CARD} ({error}); choose another or --resume never"
        ) from None


def check(path: Path, expected: Card) -> Card:
    """The card of a checkpoint that fits the run. ConfigError where it is of another method or network.

    The number of ranks and the ZeRO stage may differ.
    """
    card = read_card(path)
    for name in ("method", "entropy", "arch", "optimizer"):
        found, wanted = getattr(card, name), getattr(expected, name)
        if found != wanted:
            raise ConfigError(
                f"checkpoint {path} is of {name} {found!r}, this run of {wanted!r}; "
                "use that setting, another --output_dir, or --resume never"
            )
    return card


def changes(card: Card, now: Card) -> list[str]:
    """What a resumed run does otherwise than the one that wrote the checkpoint, a line each."""
    lines = []
    if (card.world_size, card.zero_stage) != (now.world_size, now.zero_stage):
        before, after = (f"{c.world_size} rank(s) at ZeRO {c.zero_stage}" for c in (card, now))
        lines.append(f"the checkpoint is of {before}, and was cut anew for {after}")
    if card.batch is not None and card.batch != now.batch:
        lines.append(
            f"a step has {now.batch} images now, {card.batch} in the checkpoint: its steps are counted as of today's "
            "size, schedules and epochs shift; --batch_size_per_gpu or --gradient_accumulation_steps keep it"
        )
    return lines


def restore(engine: Engine, path: Path, expected: Card) -> int:
    """Load a checkpoint of any number of ranks and ZeRO stage; returns the steps it had made. Collective.

    Raises ConfigError where it does not fit (:func:`check`), is damaged, or holds more than tensors and plain values;
    the engine is as before then.
    """
    card = check(path, expected)
    problem = saved = None
    try:
        saved = read(path, card.zero_stage, card.world_size, trained_names(engine))
        if reason := misfit(saved, engine):
            problem = (
                f"does not fit these settings ({reason}); use those of its run's config.yaml, another --output_dir,"
            )
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError, LookupError, TypeError) as error:
        problem = unloadable(error)
    if found := next((one for one in everyone(engine.world, problem) if one), None):
        raise ConfigError(f"checkpoint {path} {found} or --resume never")
    assert saved is not None
    place(saved, engine)
    return card.step


def unloadable(error: Exception) -> str:
    """What is wrong with a checkpoint that raised ``error`` when it was read, and what to do."""
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"holds more than tensors ({foreign[1]}) and is not loaded: opening it could run code. If you trust it, "
            "save its tensors anew yourself (torch.load(..., weights_only=False), torch.save); choose another"
        )
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return f"is damaged ({first}); choose another"


@contextmanager
def _summing(engine: Any) -> Iterator[tuple[dict[str, Sum], list[OSError]]]:
    """Let DeepSpeed's writer write through, and note sums and errors by file.

    An error is not raised where it happens: the other ranks would wait for this one in DeepSpeed's next barrier.
    DeepSpeed's script zero_to_fp32.py is not copied beside: it is ``python -m deepspeed.utils.zero_to_fp32`` too.
    """
    files: dict[str, Sum] = {}
    failures: list[OSError] = []

    def save(state_dict: Any, path: str) -> None:
        try:
            files[Path(path).name] = write_tensors(Path(path), state_dict)
        except OSError as error:
            failures.append(error)

    writer = engine.checkpoint_engine
    writer.save, engine._copy_recovery_script = save, lambda path: None
    try:
        yield files, failures
    finally:
        del writer.save, engine._copy_recovery_script


def _together(world: World, action: Callable[[], Any]) -> list[Any]:
    """What ``action`` returns on every rank. Where it fails on one, every rank raises SaveError."""
    mine: Any = None
    failure = None
    try:
        mine = action()
    except OSError as error:
        failure = f"{error.strerror or error}: {error.filename}"
    found = everyone(world, (mine, failure))
    if problem := next((failed for _, failed in found if failed), None):
        raise SaveError(problem)
    return [result for result, _ in found]


def _nothing() -> None:
    pass


def _complete(folder: Path) -> list[Path]:
    """The checkpoints of a folder that were published, the oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{_CARD}"))


def _content(path: Path) -> dict[str, Any]:
    """What a checkpoint's card says; nothing where it cannot be read."""
    try:
        return _read(path)
    except (OSError, ValueError):
        return {}


def _read(path: Path) -> dict[str, Any]:
    """What a checkpoint's card says. Raises OSError or ValueError where that is not what was written."""
    content = json.loads((path / _CARD).read_text())
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    if content.pop("crc32", None) not in (None, _crc32(content)):
        raise ValueError("its checksum differs")
    return content


def _crc32(content: dict[str, Any]) -> str:
    """The sum of a card's content: a wrong digit in it could change the run, and nothing else would notice."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
