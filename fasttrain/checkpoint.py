"""Checkpoints: complete or absent. DeepSpeed writes them; they are published by renaming, read as tensors only."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .config import ConfigError
from .engine import Engine

_CARD = "fasttrain.json"


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
    skipped_steps: int = 0
    rollbacks: int = 0


def publish(engine: Engine, folder: Path, card: Card, *, keep: bool) -> None:
    """Write the state after ``card.step`` steps to ``folder/step-N``, then point ``latest`` at it.

    It is written under another name and renamed, so a folder called ``step-N`` is always complete. Collective: every
    rank calls it. Unless ``keep``, the checkpoint is removed once a newer one is published.
    """
    tag = f"step-{card.step:08d}"
    hidden = folder / f".{tag}.part"
    if engine.world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step-*.part"):
            shutil.rmtree(leftover)
    dist.barrier()
    engine.deepspeed.save_checkpoint(str(folder), tag=hidden.name, save_latest=False)
    if engine.world.is_main:
        (hidden / _CARD).write_text(json.dumps(asdict(card) | {"keep": keep}, indent=1))
        if (folder / tag).exists():
            shutil.rmtree(folder / tag)
        os.replace(hidden, folder / tag)
        _write_atomically(folder / "latest", tag)
        for old in folder.glob("step-*"):
            if old.name != tag and not _is_kept(old):
                shutil.rmtree(old)
    dist.barrier()


def find(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint folder that ``--resume`` means, or None to start afresh. Raises ConfigError for a wrong path."""
    if resume == "never":
        return None
    root = output_dir if resume == "auto" else Path(resume)
    for folder in (root, root / "checkpoints"):
        if (folder / _CARD).is_file():
            return folder
        if (folder / "latest").is_file():
            found = folder / (folder / "latest").read_text().strip()
            if (found / _CARD).is_file():
                return found
            raise ConfigError(
                f"{folder / 'latest'} names {found.name}, which is not there; pass --resume CHECKPOINT or never"
            )
    if resume == "auto":
        return None
    raise ConfigError(
        f"--resume {resume}: no checkpoint there; pass a run's folder, one of its checkpoints, auto or never"
    )


def read_card(path: Path) -> Card:
    """The card of a checkpoint folder. Raises ConfigError if it cannot be read."""
    try:
        content = json.loads((path / _CARD).read_text())
        return Card(**{name: content[name] for name in Card.__dataclass_fields__ if name in content})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"checkpoint {path} has no readable {_CARD} ({error}); choose another or --resume never"
        ) from None


def check(path: Path, expected: Card) -> Card:
    """The card of a checkpoint that fits the run. ConfigError where it is of another method, network or layout."""
    card = read_card(path)
    for name in ("method", "entropy", "arch", "optimizer", "zero_stage", "world_size"):
        found, wanted = getattr(card, name), getattr(expected, name)
        if found != wanted:
            raise ConfigError(
                f"checkpoint {path} is of {name} {found!r}, this run of {wanted!r}; "
                "use that setting, another --output_dir, or --resume never"
            )
    return card


def restore(engine: Engine, path: Path, expected: Card) -> int:
    """Load a checkpoint into the engine; returns the steps it had made. Collective.

    Raises ConfigError where it does not fit (:func:`check`), is damaged, or holds more than tensors and plain values.
    """
    card = check(path, expected)
    try:
        with _tensors_only(engine.deepspeed):
            loaded, _ = engine.deepspeed.load_checkpoint(str(path.parent), tag=path.name)
    except (pickle.UnpicklingError, AssertionError, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        raise ConfigError(f"checkpoint {path} {unloadable(error)} or --resume never") from None
    if loaded is None:
        raise ConfigError(f"checkpoint {path} is incomplete; choose another or --resume never")
    return card.step


def unloadable(error: Exception) -> str:
    """What is wrong with a checkpoint that raised ``error`` when it was read, and what to do."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    if foreign := re.search(r"GLOBAL (\S+)", str(error)):
        return f"holds more than tensors ({foreign[1]}) and is not loaded; choose another"
    if "loading state_dict" in first:
        return (
            f"does not fit these settings ({' '.join(others[:1]).strip()}); use those of its run's config.yaml, "
            "another --output_dir,"
        )
    return f"is damaged ({first}); choose another"


@contextmanager
def _tensors_only(engine: Any) -> Iterator[None]:
    """Make DeepSpeed's reader refuse pickled code."""

    def load(path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)

    reader = engine.checkpoint_engine
    reader.load = load
    try:
        with torch.serialization.safe_globals(harmless()):
            yield
    finally:
        del reader.load


def harmless() -> list[Any]:
    """The few classes that DeepSpeed itself writes into a checkpoint, allowed beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _is_kept(path: Path) -> bool:
    """Whether a checkpoint stays when a newer one is published; what is left of a half-removed one does not."""
    try:
        return bool(json.loads((path / _CARD).read_text())["keep"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
