"""Files that are complete on disk or absent, and loading of tensors that never runs code."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.utils.serialization import config as serialization

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""Error numbers of a full, read-only or broken disk, which no program can fix."""


class Fingerprint(NamedTuple):
    """A file's size in bytes, and a hash of its zip directory (None in cards of earlier versions).

    The zip directory holds the name, the size and the CRC-32 of every record of a torch file. So the hash identifies
    the content, and the CRCs verify it. Bits outside of the directory and the records (local headers and padding) are
    not covered, because torch reads the same tensors whatever their value is.
    """

    size: int
    directory: str | None = None


def write_tensors(path: Path, content: Any) -> Fingerprint:
    """Write a file with ``torch.save``, flush it to the disk, and verify it by reading it back from the disk.

    Raises OSError, with the file's name and the system's reason, if any of that fails.
    """
    try:
        with path.open("wb") as file, serialization.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
            torch.save(content, file)
            _flush(file)
            _forget_pages(file)
    except (OSError, RuntimeError) as error:
        # torch's writer raises a RuntimeError while it handles the system's error.
        reason = _os_error(error)
        if reason is None:
            raise
        raise OSError(reason.errno, reason.strerror, str(path)) from None
    try:
        written = fingerprint(path)
        problem = difference(path, written)
    except (OSError, zipfile.BadZipFile) as error:
        problem = str(error)
    if problem is not None:
        raise OSError(errno.EIO, f"the file does not read back as it was written ({problem})", str(path))
    return written


def fingerprint(path: Path) -> Fingerprint:
    """Return a torch file's fingerprint. Raises OSError or BadZipFile if its directory cannot be read."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        file.seek(archive.start_dir)
        return Fingerprint(path.stat().st_size, hashlib.sha256(file.read()).hexdigest()[:16])


def difference(path: Path, expected: Fingerprint) -> str | None:
    """Return how a torch file differs from its fingerprint, or None. Reads the whole file only if its size matches."""
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path.name} has {size:,} bytes instead of {expected.size:,}"
        if expected.directory not in (None, fingerprint(path).directory):
            return f"{path.name} is corrupt (its directory differs)"
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
        return None if record is None else f"{path.name} is corrupt (the checksum of {record} differs)"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    except Exception as error:  # zipfile and the decompressors raise many kinds
        return f"{path.name} is corrupt ({error})"


def load_tensors(path: Path, classes: Sequence[Any] = ()) -> Any:
    """Map a torch file into memory and return its content. It may hold tensors, plain values and ``classes`` only.

    The tensors are read from the disk when they are used. Raises whatever ``torch.load`` raises for a damaged file.
    """
    with torch.serialization.safe_globals(list(classes)):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def describe_load_error(error: Exception) -> str:
    """Return the problem of a file whose loading raised ``error``, for a message that starts with the file."""
    text = str(error)
    if foreign := re.search(r"GLOBAL (\S+)", text):
        return (
            f"holds more than tensors ({foreign[1]}) and is not loaded: opening it could run code. Save its tensors "
            "alone, as .safetensors or as a state_dict."
        )
    if "TorchScript" in text:
        return "is a TorchScript program and is not loaded. Save its state_dict."
    if reason := re.search(r"WeightsUnpickler error: ([^.\n]*)", text):  # torch advises to load it without protection
        return "is no file of tensors, or is damaged" + (f" ({reason[1]})." if reason[1] else ".")
    if isinstance(error, KeyError):  # a number is a byte that torch takes for an instruction
        return "is no file of tensors, or is damaged." if text.isdigit() else f"is damaged (no {text})."
    return f"is damaged ({next(iter(text.splitlines()), type(error).__name__)})."


def check_writable(folder: Path) -> None:
    """Make a folder if it is missing, and raise OSError if no file can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text. The old content stays until the new content is complete on the disk."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(text.encode())
        _flush(file)
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Flush a folder's file names to the disk. Some network and FUSE file systems do it by themselves and refuse."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def finite(value: Any) -> Any:
    """Return a number, or a dictionary of numbers, as JSON can hold it: null replaces NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _forget_pages(file: BinaryIO) -> None:
    """Make the next reader of a flushed file read the disk, not the system's page cache, where that is possible."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the system's error from the chain of errors that led to this one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
