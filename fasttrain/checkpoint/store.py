"""Publish, choose and restore checkpoints. DeepSpeed writes them; verification and a rename publish them."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distributed.world import World, all_gather_object
from ..engine.zero import writer_replaced
from ..errors import ConfigError, SaveError
from ..files import Fingerprint, describe_load_error, difference, write_tensors, write_text
from .card import (
    LATEST,
    Card,
    card_problem,
    check,
    complete,
    find,
    fingerprints,
    is_complete,
    is_kept,
    leftovers,
    tag,
    write_card,
)
from .state import client_state, misfit, place, read, trained_names

if TYPE_CHECKING:
    from ..engine.engine import Engine


def publish(engine: Engine, folder: Path, card: Card, *, keep: bool, newest: int | None = None) -> None:
    """Write the state after ``card.step`` steps to ``folder/step-N``, then point ``latest`` at it.

    The files are written under another name, read back, flushed to the disk and then renamed. So a folder called
    ``step-N`` is always complete. Then older checkpoints are removed: all but the ``newest`` N or, without a number,
    all that are not marked with ``keep``. Collective: every rank calls it. Raises SaveError on every rank if any rank
    cannot write.
    """
    world, name = engine.world, tag(card.step)
    hidden = folder / f".{name}.part"

    def prepare() -> None:
        folder.mkdir(exist_ok=True)  # not the run's folder above, which somebody may have removed
        for leftover in leftovers(folder):
            shutil.rmtree(leftover)
        hidden.mkdir()

    def write() -> dict[str, Fingerprint]:
        files: dict[str, Fingerprint] = {}
        errors: list[OSError] = []

        def save(content: Any, path: str) -> None:
            try:
                files[Path(path).name] = write_tensors(Path(path), content)
            except OSError as error:  # raised later: DeepSpeed's next barrier would make the other ranks wait
                errors.append(error)

        with writer_replaced(engine.deepspeed, save):
            state = client_state(engine)
            engine.deepspeed.save_checkpoint(str(folder), tag=hidden.name, client_state=state, save_latest=False)
        if errors:
            raise errors[0]
        return files

    def finish() -> None:
        files = {name: one for part in written for name, one in part.items()}
        write_card(hidden, card, keep=keep, files=files)
        if (folder / name).exists():
            os.replace(folder / name, folder / f".{name}.old.part")
        os.replace(hidden, folder / name)
        write_text(folder / LATEST, name)  # flushes the folder's names as well
        shutil.rmtree(folder / f".{name}.old.part", ignore_errors=True)
        for old in _superfluous(folder, name, newest):
            aside = folder / f".{old.name}.old.part"  # a half-removed folder must not look like a checkpoint
            os.replace(old, aside)
            shutil.rmtree(aside, ignore_errors=True)

    try:
        _on_all_ranks(world, prepare if world.is_main else _nothing)
        written: list[dict[str, Fingerprint]] = _on_all_ranks(world, write)
        _on_all_ranks(world, finish if world.is_main else _nothing)
    except SaveError as error:
        if world.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
        last = complete(folder)
        intact = f"{last[-1].name} is the last complete one" if last else "there is none before it"
        raise SaveError(
            f"{folder / name}: the checkpoint could not be written ({error}); {intact}. "
            "Free space, then resume with --resume auto."
        ) from None


def _superfluous(folder: Path, name: str, newest: int | None) -> list[Path]:
    """Return the checkpoints to remove after ``name`` is published.

    A folder without a readable card, or with another name than a checkpoint's, is not removed: it may be a person's.
    """
    others = [path for path in complete(folder) if path.name != name and is_complete(path)]
    if newest is None:
        return [path for path in others if not is_kept(path)]
    before = [path for path in others if path.name < name]
    stay = before[-(newest - 1) :] if newest > 1 else []
    return [path for path in others if path not in stay]


def choose(resume: str, output_dir: Path, world: World) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, with every file verified, and one line per skipped checkpoint.

    With ``auto``, a corrupt checkpoint is skipped for the newest intact one before it, and a missing one for the newest
    intact one. Raises ConfigError if none is intact, or if a checkpoint given by its path is not. Collective: the ranks
    share the reading.
    """
    path = find(resume, output_dir)
    paths = [] if path is None else [path]
    if path is not None and resume == "auto" and path.parent.is_dir():
        others = [other for other in reversed(complete(path.parent)) if other != path]
        paths += [other for other in others if other.name < path.name or not path.is_dir()]
    problems: list[str] = []
    for path in paths:
        problem = _problem(path, world)
        if problem is None:
            return path, [f"{line}; resuming from {path.name}" for line in problems]
        problems.append(f"{path}: the checkpoint is corrupt: {problem}")
    if problems:
        raise ConfigError(f"{problems[0]}. Choose another or --resume never.")
    return None, []


def _problem(path: Path, world: World) -> str | None:
    """Return what is wrong with a checkpoint's files, or None. Every rank reads its share of the files."""
    if problem := card_problem(path):
        return problem
    share = list(fingerprints(path).items())[world.rank :: world.size]
    problems = (difference(path / name, expected) for name, expected in share)
    results = all_gather_object(world, next((problem for problem in problems if problem), None))
    return next((problem for problem in results if problem), None)


def restore(engine: Engine, path: Path, expected: Card) -> int:
    """Load a checkpoint of any number of ranks and ZeRO stage, and return its step. Collective.

    Raises ConfigError if the checkpoint does not fit (:func:`fasttrain.checkpoint.card.check`), is damaged, or holds
    more than tensors and plain values. The engine is unchanged in that case.
    """
    card = check(path, expected)
    problem = saved = None
    try:
        saved = read(path, card.zero_stage, card.world_size, trained_names(engine))
        if reason := misfit(saved, engine):
            if engine.method.image_memories and card.images not in (None, expected.images):
                reason += (
                    f"; {card.method} stores a row per image: the data had {card.images:,} images, "
                    f"{expected.images:,} now"
                )
            problem = (
                f"the checkpoint does not fit these settings ({reason}). Use the settings of its run's config.yaml, "
                f"the version of fasttrain that wrote it ({card.version}), or another --output_dir."
            )
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError, LookupError, TypeError) as error:
        problem = describe_load_error(error)
    if problem := next((one for one in all_gather_object(engine.world, problem) if one), None):
        raise ConfigError(f"{path}: {problem} Or choose another checkpoint, or --resume never.")
    assert saved is not None
    place(saved, engine)
    return card.step


def _on_all_ranks(world: World, action: Callable[[], Any]) -> list[Any]:
    """Run an action on every rank and return all results. If it fails on one rank, every rank raises SaveError."""
    result: Any = None
    failure = None
    try:
        result = action()
    except OSError as error:
        failure = f"{error.strerror or error}: {error.filename}"
    results = all_gather_object(world, (result, failure))
    if problem := next((failed for _, failed in results if failed), None):
        raise SaveError(problem)
    return [result for result, _ in results]


def _nothing() -> None:
    pass
