"""The interface of a source of images, folders of files, and arrays in memory.

A source's ``read(i)`` returns the bytes of a file or an array. It does not decode, crop or shuffle. Shards are in
``shards.py`` and torch data sets in ``dataset.py``. ``open.py`` chooses the source for a path.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import DataError
from ..views.recipe import MOST_CHANNELS
from .listing import Listing, digest_of, label_digest, sampled_digest, split_like
from .scan import NUMPY, SUFFIXES, Scan, check_folder

ANNOTATIONS = "val_annotations.txt"  # tiny-imagenet's held-out images lie in one folder, with their classes in a file
log = logging.getLogger("fasttrain.data")


class Source(Protocol):
    """N images, numbered from 0. Some or all of them may be unreadable."""

    name: str
    labels: NDArray[np.int64] | None  # [N] class numbers
    classes: tuple[str, ...]  # names of the classes; empty without labels
    channels: int  # natural number of channels: 1 for digits, 3 for image files
    encoded: bool  # True: read() returns a file's bytes, uint8 [length]; False: pixels [H, W, C] of any real type

    def __len__(self) -> int: ...

    def read(self, i: int) -> NDArray[Any]:
        """Return the bytes or pixels of image ``i``. Raise OSError if it cannot be read."""
        ...

    def describe(self, i: int) -> str:
        """Return a name of image ``i`` for messages: its path or number."""
        ...

    def stamp(self, i: int) -> str:
        """Return a text that changes if image ``i`` changes: path, size and date of a file, else a hash of the content.

        Raises OSError if the image cannot be read.
        """
        ...


class FolderSource:
    """Image files under ``root`` and its sub-folders, which are the classes.

    Labels are None if images lie in ``root`` itself, or if there is a single sub-folder. A file ``val_annotations.txt``
    gives the classes instead, by a line ``name<tab>class`` per image. ``classes`` fixes the class names, which a
    validation folder needs. Raises DataError if there is no image, if a class is not in ``classes``, or if there are
    shards.
    """

    channels = 3
    encoded = True

    def __init__(self, root: str | os.PathLike[str], classes: Sequence[str] | None = None) -> None:
        top = Path(root)
        check_folder(top)
        self.name = top.resolve().name
        for suffixes in (SUFFIXES, (NUMPY,)):
            self._scan = scan = Scan(str(top), suffixes)
            loose, folders = scan.top()
            self.paths = _Paths(str(top), loose)
            counts = {name: self.paths.add(scan.files(os.path.join(top, name))) for name in folders}
            self._empty = [name for name, count in counts.items() if not count]
            counts = {name: count for name, count in counts.items() if count}
            if scan.shards:
                raise _shards_among(top, scan.shards[0], len(self.paths))
            if counts or loose:
                break
        else:
            raise _no_image(top, scan)
        self._labels_from, self._unlabelled = "sub-folders", ""
        names, repeats = list(counts), list(counts.values())
        if (top / ANNOTATIONS).is_file() and (loose or (len(counts) == 1 and names[0] not in (classes or ()))):
            self._labels_from = ANNOTATIONS
            names, self._unlabelled = _annotated(top / ANNOTATIONS, self.paths)
            repeats = [1] * len(names)
        elif loose:
            self._unlabelled = "images lie directly in the folder"
        elif classes is None and len(counts) == 1:
            self._unlabelled = f"there is one sub-folder, {names[0]}"
        if classes is not None and not classes:
            self._unlabelled = "the training images have no labels"
        labelled = not self._unlabelled
        self.classes = (tuple(sorted(set(names))) if classes is None else tuple(classes)) if labelled else ()
        self.labels = self._number(top, names, repeats) if labelled else None

    def _number(self, top: Path, names: list[str], repeats: list[int]) -> NDArray[np.int64]:
        numbers = {name: k for k, name in enumerate(self.classes)}
        for name in names:
            if name not in numbers:
                raise DataError(f"{top / name}: class {name!r} is not among the training classes; remove or rename it")
        return np.repeat([numbers[name] for name in names], repeats).astype(np.int64)

    @cached_property
    def listing(self) -> Listing:
        """The findings about the folder."""
        scan, labelled = self._scan, self.labels is not None
        return Listing(
            len(self.paths),
            self.classes,
            labels_from=self._labels_from if labelled else "",
            unlabelled=self._unlabelled,
            left_out=scan.left_out.extensions,
            special=scan.left_out.special,
            split_like=split_like(self.classes) if labelled and self._labels_from != ANNOTATIONS else (),
            links_back=tuple(scan.links_back),
            notes=tuple(f"no image in the folder {name}, so it is no class" for name in self._empty)
            if labelled
            else (),
            digest=digest_of(label_digest(self), self.paths.packed()),
        )

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return the bytes of file ``i``. Raise OSError if it cannot be read."""
        return read_file(self.paths[i])

    def describe(self, i: int) -> str:
        """Return the path of file ``i``."""
        return self.paths[i]

    def stamp(self, i: int) -> str:
        """Return path, size and date of file ``i``."""
        return file_stamp(self.paths[i])


class ArraySource:
    """Images in memory, [N, H, W, C] of a real type with 1 to 16 channels, and optional class numbers [N].

    Values that are not 8-bit need the ``pixel_range`` of the recipe's pixels.

    Raises DataError for arrays of another type or shape.
    """

    encoded = False

    def __init__(
        self,
        images: NDArray[Any],
        labels: ArrayLike | None = None,
        classes: Sequence[str] = (),
        name: str = "array",
    ) -> None:
        real = images.dtype.kind in "buif"
        if not real or images.ndim != 4 or not 1 <= images.shape[-1] <= MOST_CHANNELS or images.size == 0:
            shape = f"{images.dtype} {list(images.shape)}"
            form = f"real numbers [N, H, W, C] with N >= 1 and 1 to {MOST_CHANNELS} channels"
            raise DataError(f"{name}: images are {shape}; give {form}")
        self.name, self.images, self.channels = name, images, int(images.shape[-1])
        self.labels = None if labels is None else class_numbers(labels, len(images), name)
        self.classes = tuple(classes)

    @cached_property
    def listing(self) -> Listing:
        """The findings about the arrays."""
        origin, reason = ("", "no labels were given") if self.labels is None else ("the array of labels", "")
        return Listing(len(self), self.classes, origin, reason, digest=sampled_digest(self))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> NDArray[Any]:
        """Return the pixels of image ``i`` [H, W, C]."""
        image: NDArray[Any] = self.images[i]
        return image

    def describe(self, i: int) -> str:
        """Return name and number, such as ``digit 17``."""
        return f"{self.name} {i}"

    def stamp(self, i: int) -> str:
        """Return a hash of the pixels of image ``i``."""
        return content_stamp(self.images[i])


class Subset:
    """Some images of another source, numbered from 0 in the order of ``indices``."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self._indices = source, list(indices)
        self.name, self.channels, self.encoded = source.name, source.channels, source.encoded
        self.classes = source.classes
        self.labels: NDArray[np.int64] | None = None if source.labels is None else source.labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, i: int) -> NDArray[Any]:
        """Return the bytes or pixels of image ``i``. Raise OSError if it cannot be read."""
        return self._source.read(self._indices[i])

    def describe(self, i: int) -> str:
        """Return the name of image ``i`` in the other source."""
        return self._source.describe(self._indices[i])

    def stamp(self, i: int) -> str:
        """Return the stamp of image ``i`` in the other source."""
        return self._source.stamp(self._indices[i])


def class_numbers(labels: ArrayLike, count: int, name: str) -> NDArray[np.int64] | None:
    """Return the labels as class numbers [count], or None if some are negative, which means unknown.

    Raises DataError if the labels are not one whole number per image.
    """
    numbers = np.asarray(labels)
    if numbers.shape != (count,) or not np.issubdtype(numbers.dtype, np.integer):
        kind = f"labels are {numbers.dtype} {list(numbers.shape)}"
        raise DataError(f"{name}: {kind}; give a whole number for each of the {count} images")
    if unknown := int((numbers < 0).sum()):
        log.warning("%s: %d of %d labels are negative, so unknown; all labels are left out", name, unknown, count)
        return None
    return numbers.astype(np.int64)


def read_file(path: str) -> NDArray[np.uint8]:
    """Return the bytes of a file. Raise OSError if it cannot be read, or is a FIFO or a device."""
    with open(path, "rb", buffering=0, opener=_open_regular) as file:
        return np.frombuffer(file.read(), np.uint8)


def _open_regular(path: str, flags: int) -> int:
    """Open a file, or raise OSError for a FIFO or a device, which may have been put there after the listing."""
    handle = os.open(path, flags | os.O_NONBLOCK)  # without the flag, a FIFO waits for a writer
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return handle


def file_stamp(path: str) -> str:
    """Return path, size and date of a file. Raise OSError if there is none."""
    status = os.stat(path)
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def content_stamp(content: NDArray[Any]) -> str:
    """Return a hash of an image's bytes or pixels and their shape."""
    kind = "" if content.dtype == np.uint8 else f"{content.dtype} "
    return f"{kind}{content.shape} {hashlib.sha256(content.tobytes()).hexdigest()}"


def mixed(root: Path, shard: str) -> DataError:
    """Return the error for images and shards in one place. One of them would silently be left out."""
    return DataError(f"{root}: holds images and shards ({shard}); give the folder or the glob of one of them")


def _shards_among(root: Path, shard: str, images: int) -> DataError:
    if images:
        return mixed(root, shard)
    return DataError(f"{root}: its shards are in sub-folders; give {os.path.dirname(shard)} or a glob")


def _no_image(root: Path, scan: Scan) -> DataError:
    common = sorted(scan.left_out.extensions.items(), key=lambda item: -item[1])[:3]
    others = "; found " + ", ".join(f"{count} {name or 'without one'}" for name, count in common) if common else ""
    if not scan.left_out.extensions.keys().isdisjoint((".arrow", ".parquet")):
        return DataError(f"{root}: holds a data set of Hugging Face, not image files; give hf:{root}")
    known = " ".join((*SUFFIXES, NUMPY))
    return DataError(f"{root}: no image found; looked for files ending in {known}, in any case{others}")


def _annotated(file: Path, paths: _Paths) -> tuple[list[str], str]:
    """Return the class of each image by a file of annotations, and why it cannot be used. One of both is empty."""
    rows = [line.split("\t") for line in file.read_text(errors="replace").splitlines()]
    classes = {row[0]: row[1] for row in rows if len(row) > 1}
    names = []
    for i in range(len(paths)):
        name = os.path.basename(paths[i])
        if name not in classes:
            return [], f"{file.name} has no line for {name}"
        names.append(classes[name])
    return names, ""


class _Paths:
    """Paths below one folder, in one buffer: 1.28 M strings would take three times the memory."""

    def __init__(self, root: str, paths: Iterable[str]) -> None:
        self._root = os.fsencode(os.path.join(root, ""))
        self._names, self._ends = bytearray(), array("q", [0])
        self.add(paths)

    def add(self, paths: Iterable[str]) -> int:
        """Append paths below the root, and return their number."""
        before = len(self)
        for path in paths:
            self._names += os.fsencode(path)[len(self._root) :]
            self._ends.append(len(self._names))
        return len(self) - before

    def __len__(self) -> int:
        return len(self._ends) - 1

    def packed(self) -> bytes:
        """Return all paths below the root as bytes that are the same on another machine."""
        return bytes(self._names) + self._ends.tobytes()

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(f"path {i} of {len(self)}")
        return os.fsdecode(self._root + self._names[self._ends[i] : self._ends[i + 1]])
