"""WebDataset shards: tar files in which consecutive members ``name.jpg``, ``name.cls``, ... are one sample.

The key of a sample is the name of its members up to the first dot of the last part, as in webdataset. The text between
the first and the last dot is the column: ``seg`` in ``1.seg.png``. The images of a sample are these:

- ``1.jpg``, without a column. A second one, such as ``1.png``, is left out.
- ``cam.0031.jpg``, whose column is a number: each is an image, because cameras name their frames like this.
- ``1.left.jpg`` and ``1.right.jpg``: each is an image if the sample has no image without a column. Otherwise they are
  left out as its masks or thumbnails.
- ``1.npy`` is an image in the same way, but only if the sample has no other file of an image.

Files that are left out are counted by their column and extension. The index reads headers and labels only. ``.cls``
holds a number as text, and ``.json`` an object with a whole number under ``label``. A label without a column counts for
all images of the sample. A label with one counts for the images of this column that are next to it.
"""

from __future__ import annotations

import json
import re
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from .scan import NUMPY, SUFFIXES, LeftOut
from .shards import UNLABELLED, Damaged, ShardFormat, ShardIndex, Window, shard_index

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_KINDS = {tarfile.SYMTYPE: "link in a tar", tarfile.LNKTYPE: "link in a tar", tarfile.FIFOTYPE: "FIFO"}
_KINDS |= {tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device"}
_LABELS = (".cls", ".json")
_LONGEST_LABEL = 1 << 20  # bytes
_NUMBER = re.compile(r"[._-]*[0-9][0-9._-]*")


@dataclass(slots=True)
class _Image:
    column: str
    kind: str  # column and extension, for the count of what is left out
    offset: int
    size: int
    label: int = UNLABELLED


class _Sample:
    """The images and labels of consecutive members with one key."""

    def __init__(self, key: str) -> None:
        self.key, self.label = key, UNLABELLED
        self._images: list[_Image] = []
        self._column, self._columns_first, self._columns_label = "", 0, UNLABELLED

    def add_image(self, column: str, kind: str, offset: int, size: int) -> None:
        self._enter(column)
        self._images.append(_Image(column, kind, offset, size, self._columns_label if column else UNLABELLED))

    def add_label(self, column: str, label: int) -> None:
        """Set the label of the sample, or of the images of the current column. The first label counts."""
        self._enter(column)
        if not column:
            self.label = label if self.label == UNLABELLED else self.label
        elif self._columns_label == UNLABELLED:
            self._columns_label = label
            for image in self._images[self._columns_first :]:
                image.label = label

    def _enter(self, column: str) -> None:
        if column != self._column:
            self._column, self._columns_first, self._columns_label = column, len(self._images), UNLABELLED

    def move_to(self, images: array[int], left_out: LeftOut) -> int:
        """Append offset, size and label of the sample's images. Return the number of those with a column."""
        others = [image for image in self._images if not image.kind.endswith(NUMPY)]
        chosen = others or self._images
        plain = next((image for image in chosen if not image.column), None)
        dotted = 0
        for image in self._images:
            if others and image.kind.endswith(NUMPY):
                left_out.extensions[image.kind] += 1
                continue
            if image is plain or (image.column and (plain is None or _NUMBER.fullmatch(image.column))):
                label = self.label if image.label == UNLABELLED else image.label
                images.extend((image.offset, image.size, label))
                dotted += bool(image.column)
            else:
                left_out.extensions[image.kind] += 1
        return dotted


def index(window: Window) -> ShardIndex:
    """Index a tar file. If it is truncated or corrupt, index the part before the damage."""
    images, sample, damage = array("q"), _Sample(""), ""  # offset, size, label of each image
    left_out, dotted = LeftOut(), 0
    try:
        for member in _members(window, left_out):
            key, column, extension = _split(member.name)
            if key != sample.key:
                dotted += sample.move_to(images, left_out)
                sample = _Sample(key)
            if extension in (*SUFFIXES, NUMPY):
                sample.add_image(
                    column, f".{column}{extension}" if column else extension, member.offset_data, member.size
                )
            elif extension in _LABELS:
                content = window.read(member.offset_data, min(member.size, _LONGEST_LABEL))
                sample.add_label(column, _label(extension, content))
            elif extension:
                left_out.name(member.name)
    except Damaged as error:
        damage = str(error)
        if images and images[2] != UNLABELLED and sample.label == UNLABELLED:
            sample = _Sample("")  # its label is in the lost part
    dotted += sample.move_to(images, left_out)
    damage = damage and f"{damage}; the {len(images) // 3} image(s) before it are used"
    return shard_index(images, damage, left_out, dotted)


def member_name(window: Window, offset: int) -> str:
    """Return the name of the member whose content begins at ``offset``, at most 256 bytes of it."""
    try:
        header = window.read(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
    except tarfile.HeaderError:
        return ""  # the file has changed


TAR = ShardFormat(
    f"members ending in {' '.join((*SUFFIXES, NUMPY))}, in any case", index, member_name, "the .cls or .json members"
)


def _members(window: Window, left_out: LeftOut) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files in order, and count the others. Raise Damaged after the last complete one."""
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
                elif not member.isdir() and member.name.lower().endswith(SUFFIXES):
                    left_out.kind(_KINDS.get(member.type, "special file in a tar"), f"{window.path}: {member.name}")
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


def _split(name: str) -> tuple[str, str, str]:
    """Return the key of the sample, and in lower case its column and extension. ``.hidden.jpg`` has neither."""
    folder, slash, file = name.rpartition("/")
    stem, dot, rest = file.partition(".")
    if not stem:
        return folder + slash, "", ""
    column, _, extension = rest.lower().rpartition(".")
    return folder + slash + stem, column, dot + extension


def _label(kind: str, content: bytes) -> int:
    try:
        label = int(content) if kind == ".cls" else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError):
        return UNLABELLED
    fits = isinstance(label, int) and not isinstance(label, bool) and -(2**63) < label < 2**63
    return label if fits else UNLABELLED
