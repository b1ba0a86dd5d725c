"""WebDataset shards: tar files in which consecutive members ``name.jpg``, ``name.cls``, ... are one sample.

The key of a sample is the name of its members up to the first dot of the last part, as in webdataset. The index reads
headers and labels only. ``.cls`` holds a number as text, and ``.json`` an object with a whole number under ``label``.
Other members are skipped. If a sample has several images, the first one counts. A NumPy file is the image only if
there is no other.
"""

from __future__ import annotations

import json
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from .base import NUMPY, SUFFIXES
from .shards import UNLABELLED, Damaged, ShardFormat, ShardIndex, Window, shard_index

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LONGEST_LABEL = 1 << 20  # bytes


@dataclass
class _Sample:
    key: str
    image: tuple[int, int] = (0, 0)  # offset and size; no member has offset 0
    numpy: tuple[int, int] = (0, 0)  # of a NumPy file, which is the image if there is no other
    label: int = UNLABELLED

    def add_to(self, images: array[int]) -> None:
        if place := self.image if self.image[0] else self.numpy if self.numpy[0] else None:
            images.extend((*place, self.label))


def index(window: Window) -> ShardIndex:
    """Index a tar file. If it is truncated or corrupt, index the part before the damage."""
    images, sample, damage = array("q"), _Sample(""), ""  # offset, size, label of each image
    try:
        for member in _members(window):
            key, kind = _split(member.name)
            if key != sample.key:
                sample.add_to(images)
                sample = _Sample(key)
            if kind.endswith(SUFFIXES) and not sample.image[0]:
                sample.image = member.offset_data, member.size
            elif kind.endswith(NUMPY) and not sample.numpy[0]:
                sample.numpy = member.offset_data, member.size
            elif kind in (".cls", ".json") and sample.label == UNLABELLED:
                sample.label = _label(kind, window.read(member.offset_data, min(member.size, _LONGEST_LABEL)))
    except Damaged as error:
        damage = str(error)
        if images and images[2] != UNLABELLED and sample.label == UNLABELLED:
            sample = _Sample("")  # its label is in the lost part
    sample.add_to(images)
    return shard_index(images, damage and f"{damage}; the {len(images) // 3} image(s) before it are used")


def member_name(window: Window, offset: int) -> str:
    """Return the name of the member whose content begins at ``offset``, at most 256 bytes of it."""
    try:
        header = window.read(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
    except tarfile.HeaderError:
        return ""  # the file has changed


TAR = ShardFormat(f"members ending in {' '.join((*SUFFIXES, NUMPY))}, in any case", index, member_name)


def _members(window: Window) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files in order. Raise Damaged after the last complete one."""
    end = 0
    try:
        with tarfile.open(fileobj=window.file, mode="r:", errors="replace") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # a shard of millions of members would fill the memory
                file = member.type in _FILES
                if member.size < 0:  # tarfile would go back and never end
                    raise Damaged(f"no tar header at byte {member.offset}")
                if file and member.offset_data + member.size > window.length:
                    raise Damaged(f"cut short inside {member.name}")
                end = tar.offset
                if file:
                    yield member
    except tarfile.TarError:
        pass
    if damage := _damage(window, end):
        raise Damaged(damage)


def _damage(window: Window, end: int) -> str:
    """Return why tarfile stopped at byte ``end``. It reports a corrupt header like a regular end of the file."""
    header = window.read(end, tarfile.BLOCKSIZE)
    if not header:
        return "cut short: it has no end mark"
    if header == bytes(tarfile.BLOCKSIZE):
        return ""
    if header[:2] == b"\x1f\x8b" and not end:
        return "packed with gzip; unpack it first"
    if len(header) == tarfile.BLOCKSIZE:
        try:
            tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        except tarfile.HeaderError:
            return f"no tar header at byte {end}"
    return f"cut short inside the header at byte {end}"  # or in a long name that belongs to it


def _split(name: str) -> tuple[str, str]:
    """Return the key of the sample, and the rest from the dot on in lower case. ``.hidden.jpg`` has no kind."""
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    return folder + slash + stem, (dot + rest).lower() if stem else ""


def _label(kind: str, content: bytes) -> int:
    try:
        label = int(content) if kind == ".cls" else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError):
        return UNLABELLED
    fits = isinstance(label, int) and not isinstance(label, bool) and -(2**63) < label < 2**63
    return label if fits else UNLABELLED
