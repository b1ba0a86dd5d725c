"""Images in shards: large files with many images each. An index is made once, and images are read at their offsets.

``webdataset.py`` and ``tfrecord.py`` know the formats. This module is common to both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from .base import file_stamp
from .listing import Listing, digest_of, label_digest
from .scan import LeftOut

UNLABELLED = -(2**63)
_WINDOW = 4096  # bytes read at a time by the index: a page holds a header and the labels near it
_THREADS = 8  # shards indexed at a time: on network storage, most of the time is waiting
_FORMAT = "2"  # version of the cached index; a new number makes old ones invalid
log = logging.getLogger("fasttrain.data")
T = TypeVar("T")


class Damaged(ValueError):
    """The rest of a shard cannot be used. The message is the reason."""


@dataclass(frozen=True)
class ShardIndex:
    """The places of the n images of a shard."""

    offsets: NDArray[np.int64]  # [n] bytes from the start of the file
    sizes: NDArray[np.int64]  # [n] bytes
    labels: NDArray[np.int64]  # [n]; UNLABELLED for an image without a label
    damage: str = ""  # why the rest of the shard cannot be used
    left_out: LeftOut = field(default_factory=LeftOut)
    dotted: int = 0  # images whose names have further dots, as in cam.0031.jpg


@dataclass(frozen=True)
class ShardFormat:
    """A kind of shard."""

    content: str  # for messages: the images that the index looks for
    index: Callable[[Window], ShardIndex]
    name: Callable[[Window, int], str]  # the name of the image at an offset
    labels: str  # the place of the labels


def shard_index(images: array[int], damage: str, left_out: LeftOut | None = None, dotted: int = 0) -> ShardIndex:
    """Return an index from the offset, size and label of each image, one after another."""
    offsets, sizes, labels = np.array(images, np.int64).reshape(-1, 3).T.copy()
    return ShardIndex(offsets, sizes, labels, damage, left_out or LeftOut(), dotted)


class Window:
    """A file that is read at any offset through a small buffer, for headers that lie close together."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.file = open(path, "rb", buffering=_WINDOW)  # noqa: SIM115
        self.length = os.fstat(self.file.fileno()).st_size
        self._start, self._data = 0, b""

    def read(self, at: int, count: int) -> bytes:
        """Return ``count`` bytes from offset ``at``, or fewer at the end of the file."""
        if not self._start <= at <= at + count <= self._start + len(self._data):
            self._start, self._data = at, os.pread(self.file.fileno(), max(count, _WINDOW), at)
        return self._data[at - self._start : at - self._start + count]

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class ShardSource:
    """Images in shards. Each is read at its offset in its file, and nothing is unpacked.

    ``classes`` are the values of the labels, in order. Labels are None unless every image has one, and there are at
    least two values or ``classes`` is given. ``damaged`` maps truncated or corrupt shards to a text about the part
    that is left out. The index takes 24 bytes per image. The folder ``cache`` stores it, and it is used again as long
    as names, sizes and times of the shards stay the same. Raises DataError if there is no image, or if a label is not
    in ``classes``.

    An epoch's order is a shuffle of all images, not of a window of them. So each image costs one random access. On an
    SSD this costs nothing. A spinning disk reaches about a hundred images per second. A network file system needs a
    round trip per image, and the loader's threads overlap these.
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
        self.offsets, self.sizes, self.left_out, self._dotted = (
            index.offsets,
            index.sizes,
            index.left_out,
            index.dotted,
        )
        self._unlabelled = ""
        self.damaged = {path: text for path, text in zip(self.paths, damage, strict=True) if text}
        if not len(self.offsets):
            reason = next((f"; {path}: {damage}" for path, damage in self.damaged.items()), "")
            raise DataError(f"{name}: no image in {len(self.paths)} shard(s); looked for {kind.content}{reason}")
        self._ends = np.cumsum(counts)
        self.classes, self.labels = self._number(index.labels, classes)

    def _number(
        self, values: NDArray[np.int64], classes: Sequence[str] | None
    ) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
        """Return the names of the classes, and the class number of each image."""
        missing = np.flatnonzero(values == UNLABELLED)
        if len(missing):
            if len(missing) < len(values):
                line = "%s: %d of %d images have no label, the first is %s; all labels are left out"
                log.warning(line, self.name, len(missing), len(values), self.describe(int(missing[0])))
            self._unlabelled = f"{len(missing)} of {len(values)} images have none in the shards"
            return (), None
        distinct, numbers = np.unique(values, return_inverse=True)
        names = [str(value) for value in distinct]
        if classes is None:
            if len(names) > 1:
                return tuple(names), numbers.astype(np.int64)
            self._unlabelled = f"all images have the label {names[0]}"
            return (), None
        if not classes:
            self._unlabelled = "the training images have no labels"
            return (), None
        positions = {name: k for k, name in enumerate(classes)}
        for name in names:
            if name not in positions:
                raise DataError(f"{self.name}: class {name!r} is not among the training classes; leave its images out")
        return tuple(classes), np.array([positions[name] for name in names], np.int64)[numbers]

    @cached_property
    def listing(self) -> Listing:
        """The findings about the shards."""
        names = [f"{os.path.basename(path)} {end}" for path, end in zip(self.paths, self._ends.tolist(), strict=True)]
        dotted = f"{self._dotted:,} images have further dots in their names, as in cam.0031.jpg; each is an image"
        return Listing(
            len(self),
            self.classes,
            labels_from="" if self.labels is None else self._kind.labels,
            unlabelled=self._unlabelled,
            left_out=self.left_out.extensions,
            special=self.left_out.special,
            notes=(dotted,) if self._dotted else (),
            digest=digest_of(label_digest(self), names, self.offsets.tobytes(), self.sizes.tobytes()),
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return the bytes of image ``i``. Raise OSError if they cannot be read."""
        size = int(self.sizes[i])
        with open(self._path(i), "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, int(self.offsets[i]))
        if len(data) < size:
            raise OSError("the shard has become shorter")
        return np.frombuffer(data, np.uint8)

    def describe(self, i: int) -> str:
        """Return the path of the shard, and the image's name or number in it."""
        path, offset = self._path(i), int(self.offsets[i])
        try:
            with Window(path) as window:
                name = self._kind.name(window, offset)
        except (OSError, Damaged):
            name = ""  # the file is missing or has changed
        return f"{path}: {name or 'image'} at byte {offset}"

    def stamp(self, i: int) -> str:
        """Return path, size and date of the shard, and the image's place in it."""
        return f"{file_stamp(self._path(i))} {self.offsets[i]} {self.sizes[i]}"

    def _path(self, i: int) -> str:
        return self.paths[int(np.searchsorted(self._ends, i, side="right"))]


Shards = tuple[ShardIndex, NDArray[np.int64], list[str]]  # the images of all shards; count and damage of each shard


def _cached(paths: list[str], kind: ShardFormat, folder: Path | None) -> Shards:
    """Return the index that is cached in ``folder``. Make and cache it if there is none for these files."""
    if folder is None:
        return _index(paths, kind)
    cached = folder / f"{_fingerprint(paths)}.npz"
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            rest = json.loads(str(arrays["rest"]))
            left_out, dotted = LeftOut.of(rest["left_out"]), int(rest["dotted"])
            index = ShardIndex(arrays["offsets"], arrays["sizes"], arrays["labels"], "", left_out, dotted)
            return index, arrays["counts"], [str(text) for text in arrays["damage"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        index, counts, damage = _index(paths, kind)
    part = folder / f"{cached.stem}.{os.getpid()}.part.npz"  # every rank may write one; the last rank's file stays
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(
            part,
            offsets=index.offsets,
            sizes=index.sizes,
            labels=index.labels,
            counts=counts,
            damage=np.array(damage, np.str_),
            rest=np.array(json.dumps({"left_out": index.left_out.plain(), "dotted": index.dotted})),
        )
        part.replace(cached)
    except OSError as error:
        log.warning("%s: the index of the shards cannot be cached here (%s)", folder, error.strerror)
    return index, counts, damage


def _fingerprint(paths: Iterable[str]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for path in paths:
        status = _readable(path, os.stat)
        digest.update(f"\0{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="replace"))
    return digest.hexdigest()[:32]


def _index(paths: list[str], kind: ShardFormat) -> Shards:
    def index(path: str) -> ShardIndex:
        with Window(path) as window:
            return kind.index(window)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="fasttrain-index") as pool:
        each = list(pool.map(lambda path: _readable(path, index), paths))
    left_out = LeftOut()
    for shard in each:
        left_out.add(shard.left_out)
    whole = ShardIndex(
        np.concatenate([shard.offsets for shard in each]),
        np.concatenate([shard.sizes for shard in each]),
        np.concatenate([shard.labels for shard in each]),
        left_out=left_out,
        dotted=sum(shard.dotted for shard in each),
    )
    return whole, np.array([len(shard.offsets) for shard in each], np.int64), [shard.damage for shard in each]


def _readable(path: str, use: Callable[[str], T]) -> T:
    try:
        return use(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None
