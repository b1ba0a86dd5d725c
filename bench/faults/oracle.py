"""Judge a run without the trainer's code: which checkpoints are whole, and whether two runs agree."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

_STEP = "step-" + 8 * "[0-9]"
_TIMED = ("images_per_s", "data_wait", "train_images_per_s", "train_data_wait")
Lines = list[dict[str, Any]]


def whole(checkpoint: Path) -> bool:
    """Return whether a card matches its CRC, the files match the card, and their records match their CRCs."""
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
    """Return the checkpoints of a run by step, and whether each is whole."""
    return {int(path.name[5:]): whole(path) for path in sorted((output / "checkpoints").glob(_STEP))}


def broken(output: Path) -> set[int]:
    """Return the checkpoints with a card that are not whole. A folder without a card is a rest of an old checkpoint."""
    cards = {int(path.parent.name[5:]) for path in (output / "checkpoints").glob(f"{_STEP}/fasttrain.json")}
    return {step for step, good in checkpoints(output).items() if not good} & cards


def last_whole(output: Path) -> int:
    """Return the step from which a run must resume, or 0 if no checkpoint is whole.

    It is the checkpoint that ``latest`` names or, if that is not whole, the newest whole checkpoint before it. If
    ``latest`` is lost or names no checkpoint, it is the newest whole checkpoint.
    """
    states = checkpoints(output)
    try:
        latest = int((output / "checkpoints" / "latest").read_text().removeprefix("step-"))
    except (OSError, ValueError):
        latest = -1
    return max((step for step, good in states.items() if good and (step <= latest or latest not in states)), default=0)


def under_way(output: Path) -> bool:
    """Return whether a checkpoint is being written, or was being written when all ranks ended."""
    return any((output / "checkpoints").glob(".step-*.part"))


def logged(output: Path) -> int:
    """Return the last step with a whole line in metrics.jsonl."""
    return max((line["step"] for line in _lines(output / "metrics.jsonl")), default=0)


def same_weights(output: Path, expected: Path) -> bool:
    """Return whether two runs ended with the same tensors to the last bit.

    The tensors are network, buffers, optimizer and every rank's shards.
    """
    ours, theirs = _tensors(output), _tensors(expected)
    return bool(ours) and ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours)


def same_history(output: Path, expected: Path) -> bool:
    """Return whether metrics.jsonl and log.txt have the same lines, except for times."""
    names = ("metrics.jsonl", "log.txt")
    ours, theirs = ([_untimed(_lines(run / name)) for name in names] for run in (output, expected))
    return ours == theirs and bool(ours[0])


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _tensors(output: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the newest checkpoint, by file and path in it."""
    from fasttrain.engine.zero_files import pickled_classes

    steps = checkpoints(output)
    if not steps:
        return {}
    tensors: dict[str, torch.Tensor] = {}

    def collect(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[path] = value
        elif isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                collect(inner, f"{path}/{key}")

    with torch.serialization.safe_globals(pickled_classes()):
        for file in sorted((output / "checkpoints" / f"step-{max(steps):08d}").glob("*.pt")):
            collect(torch.load(file, weights_only=True, map_location="cpu"), file.name)
    return tensors


def _lines(path: Path) -> Lines:
    lines = []
    for text in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:  # damaged, or the last line was cut
            continue
    return lines


def _untimed(lines: Lines) -> Lines:
    return [{key: value for key, value in line.items() if key not in _TIMED} for line in lines]
