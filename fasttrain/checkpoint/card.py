"""A checkpoint's card: what the checkpoint is of, which files it has, and which checkpoint of a run is the newest."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import Fingerprint, difference, write_text

CARD = "fasttrain.json"
"""The card's file name. A folder without it is not a complete checkpoint."""
LATEST = "latest"
"""The file with the name of the last published checkpoint."""
FORMAT = 1
"""The format of the checkpoints that this version writes. It reads this format and lower ones."""
_TAG = re.compile(r"step-\d{8,}")
_HIDDEN = re.compile(rf"\.{_TAG.pattern}(\.old)?\.part")


@dataclass(frozen=True)
class Card:
    """What a checkpoint is of. It can be read without opening the tensors."""

    method: str
    entropy: bool
    arch: str
    optimizer: str
    step: int
    world_size: int
    zero_stage: int
    version: str
    batch: int | None = None
    """Images per optimizer step, over all ranks."""
    origin: dict[str, str | None] = field(default_factory=dict)
    """See :func:`fasttrain.checkpoint.provenance.provenance`."""
    skipped_steps: int = 0
    """Steps so far whose loss or gradient was not finite."""
    rollbacks: int = 0
    """How often the order of the data was changed after a divergence."""
    images: int | None = None
    """Training images."""
    data: str | None = None
    """A hash of the list of training images."""
    steps_per_epoch: int | None = None
    ahead: int = 0
    """Steps by which the schedules are ahead of ``step``, because an epoch had another number of steps before."""


def tag(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps. Names sort by step."""
    return f"step-{step:08d}"


def read_card(path: Path) -> Card:
    """Return the card of a checkpoint folder. Raises ConfigError if it cannot be read or is of a later format."""
    _check_format(path)
    try:
        content = _read(path)
        known = [f.name for f in fields(Card) if f.name in content or f.default is f.default_factory is MISSING]
        for name in ("step", "world_size", "zero_stage"):
            if type(content[name]) is not int or content[name] < 0:
                raise ValueError(f"its {name} is no whole number")
        files = sum(1 for _ in path.iterdir())
        if content["zero_stage"] and content["world_size"] > files:  # every rank has a file
            raise ValueError(f"it names {content['world_size']:,} ranks, and the checkpoint has {files:,} files")
        return Card(**{name: content[name] for name in known})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: no readable {CARD} ({error}). Choose another checkpoint or --resume never."
        ) from None


def write_card(path: Path, card: Card, *, keep: bool, files: Mapping[str, Fingerprint]) -> None:
    """Write a checkpoint's card with the fingerprints of its files and a checksum of the card itself.

    ``keep`` protects the checkpoint from removal. A wrong digit in a card could change the run, and only the checksum
    would notice.
    """
    content = asdict(card) | {"format": FORMAT, "keep": keep}
    content |= {"files": {name: one._asdict() for name, one in files.items()}}
    write_text(path / CARD, json.dumps(content | {"crc32": _crc32(content)}, indent=1))


def check(path: Path, expected: Card) -> Card:
    """Return the card of a checkpoint. Raises ConfigError if it is of another method, network or optimizer.

    The number of ranks and the ZeRO stage may differ.
    """
    card = read_card(path)
    for name in ("method", "entropy", "arch", "optimizer"):
        saved, current = getattr(card, name), getattr(expected, name)
        if saved != current:
            raise ConfigError(
                f"{path}: the checkpoint is of {name} {saved!r}, this run of {current!r}. "
                "Use that setting, another --output_dir, or --resume never."
            )
    return card


def ahead_of(card: Card, steps_per_epoch: int) -> int:
    """Return the steps by which a resumed run's schedules are ahead, so that its epoch does not jump back.

    An epoch may have another number of steps than in the checkpoint: images were added or removed, or the batch is
    another one. The run then continues at the next step of the same epoch.
    """
    if card.steps_per_epoch is None:  # a checkpoint of an earlier version
        return 0
    return -(-(card.step + card.ahead) * steps_per_epoch // card.steps_per_epoch) - card.step


def changes(card: Card, now: Card) -> list[str]:
    """Return one line for each difference between a resumed run and the run that wrote the checkpoint."""
    lines = []
    if (card.world_size, card.zero_stage) != (now.world_size, now.zero_stage):
        before, after = (
            f"{c.world_size} {'rank' if c.world_size == 1 else 'ranks'} (ZeRO {c.zero_stage})" for c in (card, now)
        )
        lines.append(f"resharded the checkpoint from {before} to {after}")
    consequence = "schedules and epochs shift"
    if card.steps_per_epoch is not None and now.steps_per_epoch is not None:
        epochs = (card.step + card.ahead) / card.steps_per_epoch
        consequence = f"the run continues at step {card.step:,} and epoch {epochs:.2f}, where it was"
    if card.batch is not None and card.batch != now.batch:
        lines.append(
            f"a step has {now.batch} images, {card.batch} in the checkpoint: {consequence}. Keep the size with "
            "--batch_size_per_gpu or --gradient_accumulation_steps."
        )
    if card.images is not None and card.images != now.images:
        lines.append(f"the data has {now.images:,} images, {card.images:,} in the checkpoint: {consequence}")
    elif card.data is not None and card.data != now.data:
        lines.append("the data has as many images as in the checkpoint, but others, other names or other labels")
    return lines


def is_kept(path: Path) -> bool:
    """Return whether a checkpoint is protected from removal. A folder without a readable card is not."""
    return bool(_content(path).get("keep"))


def is_complete(path: Path) -> bool:
    """Return whether a folder has a readable card, which is written last."""
    return bool(_content(path))


def complete(folder: Path) -> list[Path]:
    """Return the published checkpoints of a ``checkpoints`` folder, the oldest first.

    A folder with another name is no checkpoint of the run, even if it has a card: it may be a copy that a person made.
    """
    return sorted(path.parent for path in folder.glob(f"step-*/{CARD}") if _TAG.fullmatch(path.parent.name))


def leftovers(folder: Path) -> list[Path]:
    """Return the folders of saves and removals that did not end."""
    return [path for path in folder.glob(".step-*.part") if _HIDDEN.fullmatch(path.name)]


def candidates(root: Path) -> list[Path]:
    """Return the checkpoints of a run, its ``checkpoints`` folder or a checkpoint folder, the preferred one first.

    ``latest`` names the preferred checkpoint, even if that one is missing. All complete checkpoints follow, the newest
    first.
    """
    for folder in (root, root / "checkpoints"):
        if (folder / CARD).is_file():
            return [folder]
        paths = complete(folder)[::-1]
        if (folder / LATEST).is_file():
            name = (folder / LATEST).read_text(errors="replace").strip()
            preferred = folder / (name if _TAG.fullmatch(name) else LATEST)
            return [preferred, *(path for path in paths if path != preferred)]
        if paths:
            return paths
    return []


def newest(run: Path) -> Path:
    """Return the newest complete checkpoint of a run, without reading its tensors. A checkpoint folder is its own.

    Raises ConfigError if the run has none, for example because it was stopped before its first one.
    """
    path = next((path for path in candidates(run) if (path / CARD).is_file()), None)
    if path is None:
        hint = "Train longer (--saveckp_freq_steps N publishes one every N steps)"
        raise ConfigError(f"{run}: no complete checkpoint. {hint}, or choose another run.")
    return path


def find(resume: str, output_dir: Path) -> Path | None:
    """Return the checkpoint folder that ``--resume`` means, or None to start from step 0.

    The folder may be missing or corrupt: :func:`fasttrain.checkpoint.store.choose` verifies it. Raises ConfigError for
    a path without a checkpoint.
    """
    if resume == "never":
        return None
    paths = candidates(output_dir if resume == "auto" else Path(resume))
    if paths or resume == "auto":
        return paths[0] if paths else None
    raise ConfigError(
        f"--resume: no checkpoint in {resume}. Pass a run's folder, one of its checkpoints, auto or never."
    )


def card_problem(path: Path) -> str | None:
    """Return why a path is not a complete checkpoint, or None. Its files are not read.

    Raises ConfigError for a checkpoint of a later format, which is not corrupt.
    """
    _check_format(path)
    if is_complete(path):
        return None
    if not path.exists():
        return "it does not exist"
    return f"it has no readable {CARD}" if path.is_dir() else "it names no checkpoint"


def fingerprints(path: Path) -> dict[str, Fingerprint]:
    """Return the fingerprints of a checkpoint's files by name.

    Cards of earlier versions have [size, CRC-32 of the file] instead. Their files are verified by the size and by the
    CRCs in the files themselves. Even older cards list no files.
    """
    files = _content(path).get("files", {})
    return {
        name: Fingerprint(**value) if isinstance(value, dict) else Fingerprint(value[0])
        for name, value in sorted(files.items())
    }


def verify(file: Path) -> None:
    """Raise ConfigError if a checkpoint's file differs from the fingerprint in the checkpoint's card."""
    expected = fingerprints(file.parent).get(file.name)
    if expected and (problem := difference(file, expected)):
        raise ConfigError(f"{file.parent}: the checkpoint is corrupt: {problem}. Choose another.")


def _check_format(path: Path) -> None:
    """Raise ConfigError for a checkpoint of a later format."""
    content = _content(path)
    written = content.get("format", 1)  # the first cards have no number
    if type(written) is not int or written > FORMAT:
        raise ConfigError(
            f"{path}: the checkpoint has format {written}, and this version of fasttrain reads up to {FORMAT}. "
            f"Install the version that wrote it ({content.get('version')}) or a later one, or use --resume never."
        )


def _content(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's card, or nothing if it cannot be read."""
    try:
        return _read(path)
    except (OSError, ValueError):
        return {}


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's card. Raises OSError or ValueError if it is missing or corrupt."""
    content = json.loads((path / CARD).read_text())
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    if content.pop("crc32", None) not in (None, _crc32(content)):
        raise ValueError("its checksum differs")
    return content


def _crc32(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
