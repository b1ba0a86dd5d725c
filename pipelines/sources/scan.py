"""A walk over folders: image files and shards in a fixed order, and a record of everything that is left out."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
NUMPY = ".npy"  # an image only where there is no other: such a file next to images may hold anything
_TFRECORD = re.compile(r"\.(tfrecords?|tfrec)(-\d+-of-\d+)?$|-\d{5}-of-\d{5}$")  # names of TensorFlow's scripts
_EXTENSION = re.compile(r"\.[a-z][a-z0-9]{0,9}$")  # not the number of 0031 in cam.0031
_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
_LOOP = "link that leads to itself"


def shard_kind(name: str) -> str | None:
    """Return ``"tar"`` or ``"tfrecord"`` for the name of a shard, and None for any other file."""
    name = name.lower()
    return "tar" if name.endswith(".tar") else "tfrecord" if _TFRECORD.search(name) else None


def check_folder(root: Path) -> None:
    """Raise DataError unless ``root`` is a folder."""
    if not root.exists():
        raise DataError(f"{root}: no such folder; check the data path")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; give the folder that holds the images")


def special_kind(path: str) -> str | None:
    """Return ``"FIFO"``, ``"socket"`` or ``"device"`` for a path that must not be opened, and None for any other."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError:
        return None


@dataclass
class LeftOut:
    """Files that are not read, because of their extension or because they are no regular files."""

    extensions: Counter[str] = field(default_factory=Counter)  # in lower case; "" is a name without one
    special: dict[str, tuple[int, str]] = field(default_factory=dict)  # by kind: the number, and the first path

    def name(self, name: str) -> None:
        """Count a file by its extension."""
        match = _EXTENSION.search(name.lower())
        self.extensions[match[0] if match else ""] += 1

    def kind(self, kind: str, path: str) -> None:
        """Count a FIFO, a device or a link by its kind."""
        count, first = self.special.get(kind, (0, path))
        self.special[kind] = count + 1, min(first, path)  # a folder has no order

    def add(self, other: LeftOut) -> None:
        """Add the files of another count."""
        self.extensions.update(other.extensions)
        for kind, (count, first) in other.special.items():
            self.special[kind] = self.special.get(kind, (0, first))[0] + count, self.special.get(kind, (0, first))[1]

    def plain(self) -> dict[str, Any]:
        """Return the counts as JSON can store them."""
        return {"extensions": dict(self.extensions), "special": {k: list(v) for k, v in self.special.items()}}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> LeftOut:
        """Return the counts that ``plain`` stored."""
        return cls(Counter(plain["extensions"]), {k: (int(n), str(p)) for k, (n, p) in plain["special"].items()})


class Scan:
    """One walk over the folder ``root``, for files that end in ``suffixes``.

    ``shards``, ``left_out`` and ``links_back`` grow with it.
    ``links_back`` are links to a folder that is above or was listed already. They are not followed.
    """

    def __init__(self, root: str, suffixes: tuple[str, ...] = SUFFIXES) -> None:
        self.root, self._suffixes = root, suffixes
        self.shards: list[str] = []
        self.left_out = LeftOut()
        self.links_back: list[str] = []
        resolved = Path(root).resolve()
        self._above = {_identity(str(folder)) for folder in (resolved, *resolved.parents)}

    def top(self) -> tuple[list[str], list[str]]:
        """Return the sorted paths of the root's image files and the sorted names of its sub-folders."""
        return self._list(self.root)

    def files(self, folder: str) -> Iterator[str]:
        """Yield the image files under a sub-folder of the root, depth first and sorted."""
        return self._walk(folder, set(self._above))

    def _walk(self, folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
        identity = _identity(folder)
        if identity in seen:
            self.links_back.append(folder)
            return
        seen.add(identity)
        files, folders = self._list(folder)
        yield from files
        for name in folders:
            yield from self._walk(os.path.join(folder, name), seen)

    def _list(self, folder: str) -> tuple[list[str], list[str]]:
        files, folders = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    kind = _kind(entry)
                    if kind == "folder":
                        folders.append(entry.name)
                    elif kind:
                        self.left_out.kind(kind, entry.path)
                    elif entry.name.lower().endswith(self._suffixes):
                        files.append(entry.path)
                    elif shard_kind(entry.name):
                        self.shards.append(entry.path)
                    else:
                        self.left_out.name(entry.name)
        except OSError as error:
            raise _unreadable(folder, error) from None
        return sorted(files), sorted(folders)


def _kind(entry: os.DirEntry[str]) -> str:
    """Return ``"folder"``, the kind of a special file, or an empty text for a file. Broken links count as files."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return ""
    except OSError:  # a circle of links
        return _LOOP
    return special_kind(entry.path) or ""


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return status.st_dev, status.st_ino


def _unreadable(folder: str, error: OSError) -> DataError:
    return DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions")
