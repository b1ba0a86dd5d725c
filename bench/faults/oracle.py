"""What must hold after a fault, found without the trainer's code: whole checkpoints, and runs that agree."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

_TIMED = ("images_per_s", "data_wait", "train_images_per_s", "train_data_wait")
Lines = list[dict[str, Any]]


def whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint's files match its card, their records match their CRCs, and the card matches its own."""
    try:
        card = json.loads((checkpoint / "fasttrain.json").read_text())
        total = card.pop("crc32", "")
        if total != f"{zlib.crc32(json.dumps(card, sort_keys=True).encode()):08x}":
            return False
        return bool(card["files"]) and all(_matches(checkpoint / n, expected) for n, expected in card["files"].items())
    except Exception:  # zipfile raises many kinds
        return False


def _matches(path: Path, expected: dict[str, Any]) -> bool:
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        directory = hashlib.sha256(content[archive.start_dir :]).hexdigest()[:16]
        return expected == {"size": len(content), "directory": directory} and archive.testzip() is None


def checkpoints(output: Path) -> dict[int, bool]:
    """The checkpoints of a run by their steps, and whether they are whole."""
    return {int(path.name[5:]): whole(path) for path in sorted((output / "checkpoints").glob("step-*"))}


def broken(output: Path) -> set[int]:
    """Checkpoints that have a card and are not whole; without one, a folder is what is left of an old checkpoint."""
    cards = {int(path.parent.name[5:]) for path in (output / "checkpoints").glob("step-*/fasttrain.json")}
    return {step for step, good in checkpoints(output).items() if not good} & cards


def last_whole(output: Path) -> int:
    """The step from which a run must go on, 0 where none is whole.

    It is that which ``latest`` names or, if that is not whole, the newest whole one before it. If ``latest`` is lost or
    names nothing that is there, it is the newest whole one.
    """
    found = checkpoints(output)
    try:
        latest = int((output / "checkpoints" / "latest").read_text().removeprefix("step-"))
    except (OSError, ValueError):
        latest = -1
    return max((step for step, good in found.items() if good and (step <= latest or latest not in found)), default=0)


def under_way(output: Path) -> bool:
    """Whether a checkpoint is, or was when all ended, being written."""
    return any((output / "checkpoints").glob(".step-*.part"))


def logged(output: Path) -> int:
    """The last step that metrics.jsonl has whole."""
    return max((line["step"] for line in _lines(output / "metrics.jsonl")), default=0)


def same_weights(output: Path, expected: Path) -> bool:
    """Whether two runs ended in the same tensors to the last bit: network, buffers, optimizer, every rank's shards."""
    ours, theirs = _tensors(output), _tensors(expected)
    return bool(ours) and ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours)


def same_history(output: Path, expected: Path) -> bool:
    """Whether metrics.jsonl and log.txt have the same lines but for times."""
    names = ("metrics.jsonl", "log.txt")
    ours, theirs = ([_untimed(_lines(run / name)) for name in names] for run in (output, expected))
    return ours == theirs and bool(ours[0])


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _tensors(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, by file and path in it."""
    from fasttrain.engine.zero_files import pickled_classes

    steps = checkpoints(output)
    if not steps:
        return {}
    found: dict[str, torch.Tensor] = {}

    def collect(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
        elif isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                collect(inner, f"{path}/{key}")

    with torch.serialization.safe_globals(pickled_classes()):
        for file in sorted((output / "checkpoints" / f"step-{max(steps):08d}").glob("*.pt")):
            collect(torch.load(file, weights_only=True, map_location="cpu"), file.name)
    return found


def _lines(path: Path) -> Lines:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except OSError:
        return []


def _untimed(lines: Lines) -> Lines:
    return [{key: value for key, value in line.items() if key not in _TIMED} for line in lines]
