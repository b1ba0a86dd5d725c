"""Draw the faults of each run and their moments from a seed, so that a campaign can be repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 48
"""Steps of an uninterrupted run."""
EVERY = 5
"""Steps between checkpoints."""
FAULTS = 4
"""Faults per run. Each one occurs after the run has resumed from the fault before."""

KILLED = ("kill -9 of one rank", "kill -9 of all ranks")
STOPPED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
DAMAGED = ("flipped bit", "cut file", "emptied file", "lost file")
"""Damages to a file of the newest checkpoint or to ``latest``, after all ranks were killed."""
FROZEN, FULL, READ_ONLY = "frozen rank", "full disk", "read-only folder"
CLOCK, IMAGES, DATA = "clock jump", "dead images", "lost data folder"
RECORDS, REMOVED, FOLDERS = "damaged records", "removed output folder", "folders of a person"
CLOSED, PAUSED, SPECIAL = "closed stdout", "paused rank", "special files"
ON_TIME = (*KILLED, *STOPPED)
"""Kinds that may occur while a checkpoint is being written."""


@dataclass(frozen=True)
class Setting:
    """A run of the command, and the kinds of faults that it can meet."""

    name: str
    flags: tuple[str, ...]
    kinds: tuple[str, ...] = (*KILLED, *KILLED, *STOPPED, *DAMAGED, READ_ONLY)
    ranks: int = 1
    images: str | None = None
    """Image files instead of the embedded digits: ``good``, or ``some dead`` from the start."""
    in_memory: bool = False
    """Whether the output folder is a small file system of its own, which can be filled."""
    faked_clock: bool = False
    piped: bool = False
    """Whether a process reads the standard output of each rank, which can be ended."""
    watchdog_minutes: float = 0.5


@dataclass(frozen=True)
class Fault:
    """One fault and its moment."""

    kind: str
    step: int
    """The fault occurs once this step is logged; 0: while the run starts."""
    saving: bool
    """Whether to wait until the next checkpoint is being written."""
    delay: float
    """Seconds to wait after that."""
    rank: int
    draw: float
    """In [0, 1): chooses the file, the byte, or the distance of the clock jump."""


@dataclass(frozen=True)
class Trial:
    """A run with its faults."""

    number: int
    seed: int
    setting: str
    faults: tuple[Fault, ...]


def _setting(method: str, flags: str, *, name: str = "", **more: object) -> Setting:
    return Setting(name or method, ("--method", method, *flags.split()), **more)  # type: ignore[arg-type]


_DISK = (*KILLED, *STOPPED, FULL, FULL, FULL)
_DATA = (*KILLED, IMAGES, IMAGES, DATA, SPECIAL, SPECIAL)
_FILES = (RECORDS, RECORDS, REMOVED, REMOVED, FOLDERS, "SIGHUP")
_CLOCK = (CLOCK, CLOCK, *KILLED, "SIGTERM")
_DINO = "--hidden_dim 32 --bottleneck_dim 8 --out_dim 64"
_TWO = (*KILLED, *KILLED, *STOPPED, *DAMAGED, READ_ONLY, FROZEN)

SETTINGS = {
    setting.name: setting
    for setting in (
        _setting("simclr", "--hidden_dim 32 --out_dim 8"),
        _setting(
            "dino", "--hidden_dim 32 --bottleneck_dim 8 --out_dim 64 --entropy --zero_stage 2", kinds=_TWO, ranks=2
        ),
        _setting("simsiam", "--dim 32 --pred_dim 8 --zero_stage 1", kinds=_DISK, in_memory=True),
        _setting("byol", "--hidden_dim 32 --out_dim 8", kinds=_DATA, images="good"),
        _setting("moco", "--out_dim 8 --queue_length 64 --zero_stage 3", kinds=_TWO, ranks=2),
        _setting("deepcluster", "--nmb_prototypes 6 --hidden_dim 32 --out_dim 8", images="some dead"),
        _setting("swav", "--nmb_prototypes 16 --hidden_dim 32 --out_dim 8", kinds=_CLOCK, faked_clock=True),
        _setting("mocov3", "--hidden_dim 32 --out_dim 8 --zero_stage 1", kinds=_DISK, ranks=2, in_memory=True),
        _setting("infomin", "--out_dim 8 --queue_length 64 --zero_stage 3"),
        _setting("simclr", "--hidden_dim 32 --out_dim 8 --entropy", name="simclr on two", kinds=_TWO, ranks=2),
        _setting("cmc", "--out_dim 8 --negatives 16", kinds=_DATA, images="good"),
        _setting("simsiam", "--dim 32 --pred_dim 8", name="simsiam on a desk", kinds=_FILES),
        _setting(
            "byol",
            "--hidden_dim 32 --out_dim 8",
            name="byol in a terminal",
            kinds=(CLOSED, PAUSED, PAUSED, RECORDS, "SIGHUP"),
            piped=True,
            watchdog_minutes=0.15,
        ),
        _setting("dino", _DINO, name="dino on a desk, on two", kinds=(CLOSED, *_FILES), ranks=2, piped=True),
    )
}


def plan(seed: int, trials: int) -> list[Trial]:
    """Return the trials of a campaign. The settings alternate, and a longer campaign begins with a shorter one."""
    names = list(SETTINGS)
    return [_trial(seed, number, SETTINGS[names[number % len(names)]]) for number in range(trials)]


def _trial(seed: int, number: int, setting: Setting) -> Trial:
    rng = random.Random(f"{seed} {number}")
    # After the last fault there must be time for a checkpoint before the run ends.
    steps = sorted(rng.sample(range(1, STEPS - EVERY, 2), FAULTS))
    if rng.random() < 0.2:
        steps[0] = 0
    faults = [_fault(rng, step, setting) for step in steps]
    faults.sort(key=lambda fault: fault.kind == CLOSED)  # a run that loses its display continues to its end
    return Trial(number, seed, setting.name, tuple(faults))


def _fault(rng: random.Random, step: int, setting: Setting) -> Fault:
    kinds: Sequence[str] = setting.kinds if step else KILLED
    kind = rng.choice([kind for kind in kinds if setting.ranks > 1 or kind != KILLED[0]])
    saving = step > 0 and kind in ON_TIME and rng.random() < 0.6
    delay = rng.uniform(0, 0.03 if saving else 0.1 if step else 8)
    return Fault(kind, step, saving, delay, rng.randrange(setting.ranks), rng.random())
