"""Files that are on the disk, whole: summed while they are written, flushed, read back, and known again by the sum."""

from __future__ import annotations

import errno
import math
import os
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch

_BLOCK = 1 << 22  # bytes read at a time
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""What a full, read-only or broken disk answers: nothing that a program can mend."""


class Sum(NamedTuple):
    """A file's size in bytes and the CRC-32 of its content, in hexadecimal."""

    size: int
    crc32: str


def write_tensors(path: Path, content: Any) -> Sum:
    """``torch.save`` to a file that is then on the disk, read back, and found to be what was written.

    Raises OSError, with the file's name and the system's reason, where that fails.
    """
    stream = None
    try:
        with path.open("wb") as file:
            stream = _Summing(file)
            torch.save(content, cast(IO[bytes], stream))  # it needs no more of a file
            _flush(file)
    except (OSError, RuntimeError) as error:  # torch's writer raises errors of its own over the system's
        first = error if stream is None or stream.failed is None else stream.failed
        if isinstance(first, OSError):
            raise OSError(first.errno, first.strerror, str(path)) from None
        raise
    if (found := checksum(path)) != stream.sum:
        raise OSError(errno.EIO, f"what was written ({stream.sum}) does not read back ({found})", str(path))
    return stream.sum


def checksum(path: Path) -> Sum:
    """The sum of a file, read in blocks. Raises OSError where it cannot be read."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return Sum(size, f"{crc:08x}")


def difference(path: Path, expected: Sum) -> str | None:
    """What is wrong with a file that should have this sum, or None. A wrong size is found without reading it."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path.name} has {size:,} bytes, {expected.size:,} were written"
        return None if checksum(path) == expected else f"{path.name} is not what was written (its checksum differs)"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text that is on the disk: the old content stays until the new one is whole."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(text.encode())
        _flush(file)
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Summing:
    """A file to torch's writer, which writes from start to end; it keeps the sum, and the first error."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sum = Sum(0, "00000000")
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        crc = zlib.crc32(data, int(self.sum.crc32, 16))
        self.sum = Sum(self.sum.size + memoryview(data).nbytes, f"{crc:08x}")
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = self.failed or error
            raise

    def flush(self) -> None:
        if self.failed is None:
            self.file.flush()


def finite(value: Any) -> Any:
    """What JSON can hold of a number, or of a dictionary of them: it has no NaN, so what is not finite becomes null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
