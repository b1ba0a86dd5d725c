"""Publish, choose and restore checkpoints. DeepSpeed writes them; verification and a rename publish them."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distributed.memory import available_memory
from ..distributed.world import World, all_gather_object
from ..engine.zero import save_state
from ..errors import ConfigError, SaveError
from ..files import Fingerprint, describe_load_error, difference, write_tensors, write_text
from .agreement import Agreement
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
from .snapshot import HostCopy
from .state import client_state, misfit, open_files, place, read, trained_names

if TYPE_CHECKING:
    from ..engine.engine import Engine

_MEMORY_FRACTION = 0.5
"""Fraction of the free host memory that the copy of a state may take: an evaluation needs memory as well."""


class Publisher:
    """Publishes the checkpoints of an engine in a folder, while the training continues.

    The training waits for a copy of the state to host memory. A thread of each rank then writes the copy, and the first
    rank's thread publishes the checkpoint when all ranks have written. At most one checkpoint is being written. Where
    the copy does not fit into the free host memory, the rank waits until the checkpoint is published, and ``note`` gets
    a line. Made by all ranks.
    """

    def __init__(self, engine: Engine, folder: Path, *, newest: int | None, note: Callable[[str], None]) -> None:
        self.engine, self.folder, self.newest, self._note = engine, folder, newest, note
        self._agreement = Agreement(engine.world)
        self._memory = HostCopy()
        self._step: int | None = None
        """The step of a checkpoint whose success the ranks have not agreed on yet."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def publish(self, card: Card, *, keep: bool) -> None:
        """Start to publish the state after ``card.step`` steps as ``folder/step-N``. Collective.

        Wait for the checkpoint before it first. Raise SaveError on every rank if that one could not be written.
        """
        self.wait()
        hidden = self.folder / f".{tag(card.step)}.part"
        files, copied = self._state(hidden)
        self._step = card.step
        self._thread = threading.Thread(
            target=self._work, args=(card, keep, hidden, files), name="fasttrain-checkpoint", daemon=True
        )
        self._thread.start()
        if not copied:
            self._thread.join()

    def wait(self) -> None:
        """Wait until the last checkpoint is published. Raise SaveError on every rank if it could not be. Collective."""
        self._step = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def check(self, step: int) -> None:
        """Raise the error of :meth:`wait` if the checkpoint that is being written has failed. Collective.

        The ranks agree 1, 2, 4, 8, ... steps after the copy, so the many steps of a long write cost few reductions.
        """
        if self._step is None or (step - self._step) & (step - self._step - 1):
            return
        ended = self._thread is None or not self._thread.is_alive()
        if self.engine.mean([float(ended)])[0] == 1:
            self.wait()

    def _state(self, hidden: Path) -> tuple[dict[str, Any], bool]:
        """Return this rank's files by name, and whether they are a copy. Collective."""
        engine = self.engine
        files: dict[str, Any] = {}
        save_state(engine.deepspeed, engine.stage, hidden, client_state(engine), files)
        needed, available = self._memory.bytes_to_allocate(files), available_memory() // engine.world.local_size
        if needed > available * _MEMORY_FRACTION:
            self._note(
                f"checkpoints: the training waits while they are written, because a copy of {needed / 1e9:.1f} GB does "
                f"not fit into the free host memory of {available / 1e9:.1f} GB per rank"
            )
            self._note = _ignore
            return files, False
        return self._memory.fill(files), True

    def _work(self, card: Card, keep: bool, hidden: Path, files: Mapping[str, Any]) -> None:
        """Write, verify and publish. Runs in the thread.

        The files are written under another name, read back, flushed to the disk and then renamed. So a folder called
        ``step-N`` is always complete, and ``latest`` names a checkpoint only when it is. Then older checkpoints are
        removed: all but the ``newest`` N or, without a number, all that are not marked with ``keep``.
        """
        folder, name, main = self.folder, tag(card.step), self.engine.world.is_main

        def prepare() -> None:
            folder.mkdir(exist_ok=True)  # not the run's folder above, which somebody may have removed
            for leftover in leftovers(folder):
                shutil.rmtree(leftover)
            hidden.mkdir()

        def write() -> dict[str, Fingerprint]:
            return {name: write_tensors(hidden / name, content) for name, content in files.items()}

        def finish() -> None:
            files = {name: Fingerprint(*one) for part in written for name, one in part.items()}
            write_card(hidden, card, keep=keep, files=files)
            if (folder / name).exists():
                os.replace(folder / name, folder / f".{name}.old.part")
            os.replace(hidden, folder / name)
            write_text(folder / LATEST, name)  # flushes the folder's names as well
            shutil.rmtree(folder / f".{name}.old.part", ignore_errors=True)
            for old in _superfluous(folder, name, self.newest):
                aside = folder / f".{old.name}.old.part"  # a half-removed folder must not look like a checkpoint
                os.replace(old, aside)
                shutil.rmtree(aside, ignore_errors=True)

        try:
            self._agreement.run(prepare if main else _nothing)
            written = self._agreement.run(write)
            self._agreement.run(finish if main else _nothing)
        except SaveError as error:
            if main:
                shutil.rmtree(hidden, ignore_errors=True)
            last = complete(folder)
            intact = f"{last[-1].name} is the last complete one" if last else "there is none before it"
            self._error = SaveError(
                f"{folder / name}: the checkpoint could not be written ({error}); {intact}. "
                "Free space, then resume with --resume auto."
            )
        except Exception as error:
            self._error = error


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


def set_aside_after(folder: Path, steps: Collection[int]) -> Path | None:
    """Make the newest checkpoint of one of ``steps`` the newest of all, and return it; None if there is none.

    Later checkpoints keep their files under the name ``step-N-forgotten``, and no command takes them for a part of the
    run.
    """
    names = {tag(step) for step in steps}
    good = next((path for path in reversed(complete(folder)) if path.name in names), None)
    for path in complete(folder):
        if good is None or path.name > good.name:
            aside = path.with_name(f"{path.name}-forgotten")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
    if good is not None:
        write_text(folder / LATEST, good.name)
    else:
        (folder / LATEST).unlink(missing_ok=True)
    return good


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
        else:
            open_files(saved, engine)
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError, LookupError, TypeError) as error:
        problem = describe_load_error(error)
    if problem := next((one for one in all_gather_object(engine.world, problem) if one), None):
        raise ConfigError(f"{path}: {problem} Or choose another checkpoint, or --resume never.")
    assert saved is not None
    place(saved, engine)
    return card.step


def _nothing() -> None:
    pass


def _ignore(_: str) -> None:
    pass
