"""Files that are on the disk, whole, or an error that says why not."""

import errno
import re
import resource
import zlib

import pytest
import torch

from fasttrain.files import Sum, checksum, difference, sync_folder, write_tensors, write_text

_CONTENT = {"weight": torch.arange(100_000.0), "step": 3}


def test_what_is_written_is_what_torch_reads_and_its_sum_is_the_file_s(tmp_path):
    path = tmp_path / "tensors.pt"
    written = write_tensors(path, _CONTENT)
    content = path.read_bytes()
    assert written == checksum(path) == Sum(len(content), f"{zlib.crc32(content):08x}")
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert torch.equal(found["weight"], _CONTENT["weight"])
        assert found["step"] == 3
    assert difference(path, written) is None


@pytest.mark.parametrize("limit", [0, 1000, 400_000])
def test_a_full_disk_is_an_error_with_the_system_s_reason(tmp_path, limit):
    """torch's writer raises errors of its own over the system's."""
    path, before = tmp_path / "tensors.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_tensors(path, _CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        write_tensors(tmp_path / "missing" / "tensors.pt", _CONTENT)


def test_what_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    """A disk that takes everything and keeps something else."""
    monkeypatch.setattr("fasttrain.files.os.fsync", lambda handle: (tmp_path / "tensors.pt").write_bytes(b"else"))
    with pytest.raises(OSError, match=r"what was written .* does not read back"):
        write_tensors(tmp_path / "tensors.pt", _CONTENT)


def test_what_cannot_be_pickled_is_no_disk_error(tmp_path):
    with pytest.raises(Exception, match="pickle") as error:
        write_tensors(tmp_path / "tensors.pt", lambda: None)
    assert not isinstance(error.value, OSError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(b"short"), "file has 5 bytes, 1,200 were written"),
        (
            lambda path: path.write_bytes(bytes(1199) + b"\x01"),
            r"file is not what was written \(its checksum differs\)",
        ),
        (lambda path: path.unlink(), r"file cannot be read \(No such file or directory\)"),
        (lambda path: (path.unlink(), path.mkdir()), r"file (has|cannot be read) .*"),
    ],
    ids=["size", "bit", "missing", "folder"],
)
def test_every_difference_is_named(tmp_path, change, message):
    path = tmp_path / "file"
    path.write_bytes(bytes(1200))
    expected = checksum(path)
    change(path)
    found = difference(path, expected)
    assert found is not None
    assert re.fullmatch(message, found), found


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


def test_a_folder_can_be_synchronised(tmp_path):
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "missing")
