"""Files are complete on the disk, or an error says why not."""

import errno
import io
import os
import re
import stat
import zipfile

import pytest
import torch

from fasttrain.files import (
    Fingerprint,
    difference,
    fingerprint,
    finite,
    load_tensors,
    sync_folder,
    write_tensors,
    write_text,
)
from tests.checkpoints import largest_file

_CONTENT = {"weight": torch.arange(100_000.0), "step": 3}


def test_written_tensors_are_read_back_and_fingerprinted(tmp_path):
    path = tmp_path / "tensors.pt"
    written = write_tensors(path, _CONTENT)
    assert written == fingerprint(path)
    assert written.size == path.stat().st_size
    assert difference(path, written) is None
    assert difference(path, Fingerprint(written.size)) is None  # of an earlier version's card
    content = load_tensors(path)
    assert torch.equal(content["weight"], _CONTENT["weight"])
    assert content["step"] == 3


@pytest.mark.parametrize("limit", [0, 1000, 400_000])
def test_a_full_disk_raises_the_systems_reason(tmp_path, limit):
    """torch's writer raises errors of its own after the system's."""
    path = tmp_path / "tensors.pt"
    with largest_file(limit), pytest.raises(OSError, match="File too large") as error:
        write_tensors(path, _CONTENT)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))


def test_a_missing_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "missing" / "tensors.pt", _CONTENT)


@pytest.mark.parametrize("kept", [b"else", None])
def test_a_file_that_does_not_read_back_raises(tmp_path, monkeypatch, kept):
    """A disk that accepts everything and stores something else: another content, or one wrong bit."""
    path, fsync = tmp_path / "tensors.pt", os.fsync

    def damage(handle):
        fsync(handle)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content if kept is None else kept)

    monkeypatch.setattr("fasttrain.files.os.fsync", damage)
    with pytest.raises(OSError, match="read back") as error:
        write_tensors(path, _CONTENT)
    assert error.value.errno == errno.EIO


def test_unpicklable_content_is_no_disk_error(tmp_path):
    with pytest.raises(Exception, match="pickle") as error:
        write_tensors(tmp_path / "tensors.pt", lambda: None)
    assert not isinstance(error.value, OSError)


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    """Bits outside of the records and the directory are padding and local headers, which torch does not interpret."""
    path = tmp_path / "tensors.pt"
    expected = {"weight": torch.arange(50.0), "mask": torch.ones(7), "step": 3}
    written = write_tensors(path, expected)
    original = path.read_bytes()
    undetected = 0
    for position in range(0, 8 * len(original), 11):
        content = bytearray(original)
        content[position // 8] ^= 1 << position % 8
        path.write_bytes(content)
        if difference(path, written) is None:
            undetected += 1
            loaded = torch.load(io.BytesIO(content), weights_only=True)
            assert str(loaded) == str(expected), position
    with zipfile.ZipFile(io.BytesIO(original)) as archive:
        records = sum(record.file_size for record in archive.infolist())
        assert undetected * 11 < 8 * (archive.start_dir - records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "tensors.pt has [0-9,]+ bytes instead of [0-9,]+"),
        (lambda path: torch.save({**_CONTENT, "step": 4}, path), "tensors.pt is corrupt .*"),
        (lambda path: path.unlink(), r"tensors.pt cannot be read \(No such file or directory\)"),
        (lambda path: (path.unlink(), path.mkdir()), r"tensors.pt (has|cannot be read) .*"),
    ],
    ids=["cut", "swapped for another valid file", "missing", "folder"],
)
def test_every_difference_is_named(tmp_path, change, message):
    path = tmp_path / "tensors.pt"
    written = write_tensors(path, _CONTENT)
    change(path)
    assert re.fullmatch(message, difference(path, written))


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fasttrain.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "newer")
    assert path.read_text() == "new"
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")


def test_finite_replaces_what_json_cannot_hold():
    values = {"loss": float("nan"), "more": {"norm": float("inf")}, "step": 3}
    assert finite(values) == {"loss": None, "more": {"norm": None}, "step": 3}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch, number):
    """On some network mounts no checkpoint could be saved."""
    fsync = os.fsync

    def refused(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, "refused")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refused)
    write_text(tmp_path / "x", "text")
    assert (tmp_path / "x").read_text() == "text"


def test_written_file_is_verified_from_the_disk(tmp_path, monkeypatch):
    """The system's page cache has the bytes that were written, whatever the disk has."""
    calls, advise, fsync = [], os.posix_fadvise, os.fsync

    def fadvise(handle, *rest):
        calls.append(rest)
        advise(handle, *rest)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("flushed") or fsync(handle))
    write_tensors(tmp_path / "x.pt", {"a": torch.zeros(3)})
    assert calls == ["flushed", (0, 0, os.POSIX_FADV_DONTNEED)]
