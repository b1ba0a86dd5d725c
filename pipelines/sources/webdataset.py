"""WebDataset shards: tar files in which ``name.jpg``, ``name.cls``, ... in a row are one sample.

The key of a sample is its members' name up to the first dot of the last part, as in webdataset. Only headers are read,
and the labels: ``.cls`` holds a number as text, ``.json`` an object with a whole number under ``label``. Members of
other kinds are passed over; of several images in a sample the first counts. Format: POSIX.1-2017 pax, and GNU tar.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from .base import SUFFIXES
from .shards import UNLABELLED, Damaged, ShardFormat, ShardIndex, Window, shard_index

_BLOCK = 512
_FILE, _LONG_NAME, _EXTENDED = b"0\07", b"L", b"x"
_LONGEST = 1 << 20  # bytes of a name or label that are believed


@dataclass
class _Sample:
    key: str
    image: tuple[int, int] = (0, 0)  # offset and size; an offset of 0 is no member's
    label: int = UNLABELLED

    def add_to(self, found: array[int]) -> None:
        if self.image[0]:
            found.extend((*self.image, self.label))


def index(window: Window) -> ShardIndex:
    """Index a tar file; of one that is cut short or broken, what is whole."""
    found, sample, damage = array("q"), _Sample(""), ""  # offset, size, label of each image
    try:
        for name, offset, size in _members(window):
            key, kind = _split(name)
            if key != sample.key:
                sample.add_to(found)
                sample = _Sample(key)
            if kind.endswith(SUFFIXES) and not sample.image[0]:
                sample.image = offset, size
            elif kind in (".cls", ".json") and sample.label == UNLABELLED:
                sample.label = _label(kind, window.read(offset, min(size, _LONGEST)))
    except Damaged as error:
        damage = str(error)
        if found and found[2] != UNLABELLED and sample.label == UNLABELLED:
            sample = _Sample("")  # its label is in what is lost
    sample.add_to(found)
    return shard_index(found, damage and f"{damage}; the {len(found) // 3} image(s) before it are used")


def member_name(window: Window, offset: int) -> str:
    """Name of the member whose content begins at ``offset``."""
    return _short_name(window.read(offset - _BLOCK, _BLOCK))


TAR = ShardFormat(f"members ending in {' '.join(SUFFIXES)}, in any case", index, member_name)


def _members(window: Window) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each regular file, in order; raises Damaged after the last whole one."""
    at, name, size = 0, None, None  # name and size: from an extended header, for the member that follows
    while at < window.length:
        header = window.read(at, _BLOCK)
        if len(header) < _BLOCK:
            raise Damaged(f"cut short inside the header at byte {at}")
        if not header.strip(b"\0"):
            return
        if header[257:262] != b"ustar" and not _sums_up(header):
            packed = header[:2] == b"\x1f\x8b" and not at
            raise Damaged("packed with gzip; unpack it first" if packed else f"no tar header at byte {at}")
        kind, start = header[156:157], at + _BLOCK
        length = _number(header[124:136], at) if size is None else size
        called = _short_name(header) if name is None else name
        if start + length > window.length:
            raise Damaged(f"cut short inside {called}")
        if kind == _LONG_NAME:
            name = window.read(start, min(length, _LONGEST)).rstrip(b"\0").decode(errors="replace")
        elif kind == _EXTENDED:
            records = _extended(window.read(start, min(length, _LONGEST)))
            name = records.get("path", name)
            size = int(records["size"]) if records.get("size", "").isdigit() else size
        else:
            if kind in _FILE and not called.endswith("/"):
                yield called, start, length
            name = size = None
        at = start + -(-length // _BLOCK) * _BLOCK
    raise Damaged("cut short: it has no end mark")


def _split(name: str) -> tuple[str, str]:
    """Key of the sample, and the rest in lower case, from its dot on; no image is called ``.hidden.jpg``."""
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


def _short_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""  # GNU has times there
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _number(field: bytes, at: int) -> int:
    """A size: octal digits, or for 8 GiB and more a big-endian number marked by its highest bit."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise Damaged(f"no tar header at byte {at}") from None


def _sums_up(header: bytes) -> bool:
    """Whether the header's checksum is right; only those from before POSIX need to be asked, for they have no mark."""
    try:
        return int(header[148:156].strip(b" \0") or b"0", 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
    except ValueError:
        return False


def _extended(content: bytes) -> dict[str, str]:
    """Records of a pax header: ``length key=value`` and a line feed each."""
    records, at = {}, 0
    while at < len(content):
        length = content[at : at + 20].partition(b" ")[0]
        if not length.isdigit() or not int(length):
            break
        key, _, value = content[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        records[key.decode(errors="replace")] = value.decode(errors="replace")
        at += int(length)
    return records
