"""Images in shards, large files with many images each: where every image lies, found out once, and read from there.

What a tar or TFRecord file looks like inside is in ``webdataset.py`` and ``tfrecord.py``; here is what they share.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from .base import file_stamp

UNLABELLED = -(2**63)
_WINDOW = (
    4096  # bytes read at a time where an index is made: a page, which holds a header and what little lies round it
)
_THREADS = 8  # shards indexed at once: on network storage most of the time is waiting
_FORMAT = "1"  # of the kept index; another number makes those that are there void
log = logging.getLogger("fasttrain.data")
T = TypeVar("T")


class Damaged(ValueError):
    """From here on a shard cannot be used; the message is the reason."""


@dataclass(frozen=True)
class ShardIndex:
    """Where the n images of a shard lie."""

    offsets: NDArray[np.int64]  # [n] bytes from the start of the file
    sizes: NDArray[np.int64]  # [n] bytes
    labels: NDArray[np.int64]  # [n]; UNLABELLED where the shard has none
    damage: str = ""  # what keeps the rest of the shard from being used


@dataclass(frozen=True)
class ShardFormat:
    """A kind of shard: how one is indexed, and what people call the image at a place in it."""

    what: str  # for messages: what was looked for
    index: Callable[[Window], ShardIndex]
    name: Callable[[Window, int], str]


def shard_index(found: array[int], damage: str) -> ShardIndex:
    """Make an index from offset, size and label of each image, in one row."""
    offsets, sizes, labels = np.array(found, np.int64).reshape(-1, 3).T.copy()
    return ShardIndex(offsets, sizes, labels, damage)


class Window:
    """A file read at random through one small buffer, for headers that lie close to each other."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = open(path, "rb", buffering=_WINDOW)  # noqa: SIM115
        self.length = os.fstat(self.file.fileno()).st_size
        self._start, self._data = 0, b""

    def read(self, at: int, count: int) -> bytes:
        """``count`` bytes from ``at``, fewer where the file ends."""
        if not self._start <= at <= at + count <= self._start + len(self._data):
            self._start, self._data = at, os.pread(self.file.fileno(), max(count, _WINDOW), at)
        return self._data[at - self._start : at - self._start + count]

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class ShardSource:
    """Images in shards, each read by its place in its file; nothing is unpacked.

    ``classes`` are the label's values, in order; a value beyond given ones is a DataError. Labels are None unless every
    image has one and there are at least two values, or given classes. ``damaged`` says of the shards that are cut short
    or broken what of them is left out. The index takes 24 bytes an image. With ``cache``, a folder, it is kept there
    and used again while names, sizes and times of the shards stay the same.

    An epoch's order is a shuffle of all images, not of a window of them: each image costs one access at random. That is
    nothing to an SSD; of a spinning disk it leaves about a hundred images a second, and a network file system takes a
    round trip an image, which the loader's threads overlap.
    """

    channels = 3
    encoded = True

    def __init__(
        self,
        paths: Sequence[str],
        kind: ShardFormat,
        name: str,
        classes: Sequence[str] | None = None,
        cache: Path | None = None,
    ) -> None:
        self.name, self.paths, self._kind = name, list(paths), kind
        index, counts, damage = _cached(self.paths, kind, cache)
        self.offsets, self.sizes = index.offsets, index.sizes
        self.damaged = {path: why for path, why in zip(self.paths, damage, strict=True) if why}
        if not len(self.offsets):
            why = next((f"; {path}: {why}" for path, why in self.damaged.items()), "")
            raise DataError(f"{name}: no image in {len(self.paths)} shard(s); looked for {kind.what}{why}")
        self._ends = np.cumsum(counts)
        self.classes, self.labels = self._number(index.labels, classes)

    def _number(
        self, values: NDArray[np.int64], classes: Sequence[str] | None
    ) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
        """Names and numbers of the classes."""
        missing = np.flatnonzero(values == UNLABELLED)
        if len(missing):
            if len(missing) < len(values):
                line = "%s: %d of %d images have no label, the first is %s; all labels are left out"
                log.warning(line, self.name, len(missing), len(values), self.describe(int(missing[0])))
            return (), None
        found, numbers = np.unique(values, return_inverse=True)
        names = [str(value) for value in found]
        if classes is None:
            return (tuple(names), numbers.astype(np.int64)) if len(names) > 1 else ((), None)
        if not classes:
            return (), None
        number = {name: k for k, name in enumerate(classes)}
        for name in names:
            if name not in number:
                raise DataError(f"{self.name}: class {name!r} is not among the training classes; leave its images out")
        return tuple(classes), np.array([number[name] for name in names], np.int64)[numbers]

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Bytes of image ``i``; OSError where they cannot be read."""
        size = int(self.sizes[i])
        with open(self._path(i), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self.offsets[i]))
        if len(data) < size:
            raise OSError("the shard has become shorter")
        return np.frombuffer(data, np.uint8)

    def describe(self, i: int) -> str:
        """Path of the shard, and the image's name or number in it."""
        path, offset = self._path(i), int(self.offsets[i])
        try:
            with Window(path) as window:
                name = self._kind.name(window, offset)
        except (OSError, Damaged):
            name = ""  # the file is gone or is another
        return f"{path}: {name or 'image'} at byte {offset}"

    def stamp(self, i: int) -> str:
        """Path, size and date of the shard, and the image's place in it."""
        return f"{file_stamp(self._path(i))} {self.offsets[i]} {self.sizes[i]}"

    def _path(self, i: int) -> str:
        return self.paths[int(np.searchsorted(self._ends, i, side="right"))]


Found = tuple[ShardIndex, NDArray[np.int64], list[str]]  # all shards' images; and each one's count and damage


def _cached(paths: list[str], kind: ShardFormat, folder: Path | None) -> Found:
    """The index from ``folder`` if it is there and still true, else made anew and put there."""
    if folder is None:
        return _index(paths, kind)
    kept = folder / f"{_fingerprint(paths)}.npz"
    try:
        with np.load(kept, allow_pickle=False) as held:
            index = ShardIndex(held["offsets"], held["sizes"], held["labels"])
            return index, held["counts"], [str(why) for why in held["damage"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        index, counts, damage = _index(paths, kind)
    part = folder / f"{kept.stem}.{os.getpid()}.part.npz"  # every rank may write it; the last one's stays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            part,
            offsets=index.offsets,
            sizes=index.sizes,
            labels=index.labels,
            counts=counts,
            damage=np.array(damage, np.str_),
        )
        part.replace(kept)
    except OSError as error:
        log.warning("%s: the index of the shards cannot be kept here (%s)", folder, error.strerror)
    return index, counts, damage


def _fingerprint(paths: Iterable[str]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for path in paths:
        status = _readable(path, os.stat)
        digest.update(f"\0{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="replace"))
    return digest.hexdigest()[:32]


def _index(paths: list[str], kind: ShardFormat) -> Found:
    def one(path: str) -> ShardIndex:
        with Window(path) as window:
            return kind.index(window)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fasttrain-index") as pool:
        each = list(pool.map(lambda path: _readable(path, one), paths))
    whole = ShardIndex(
        np.concatenate([index.offsets for index in each]),
        np.concatenate([index.sizes for index in each]),
        np.concatenate([index.labels for index in each]),
    )
    return whole, np.array([len(index.offsets) for index in each], np.int64), [index.damage for index in each]


def _readable(path: str, use: Callable[[str], T]) -> T:
    try:
        return use(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
