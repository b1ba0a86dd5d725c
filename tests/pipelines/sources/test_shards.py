import os

import numpy as np
import pytest

from fasttrain.pipelines import DataError
from fasttrain.pipelines.sources import shards
from fasttrain.pipelines.sources.shards import ShardSource
from fasttrain.pipelines.sources.tfrecord import TFRECORD
from fasttrain.pipelines.sources.webdataset import TAR

from .shard_files import example, jpeg, samples, write_tar, write_tfrecord


@pytest.fixture
def tars(tmp_path):
    """Three shards of 3, 0 and 4 images."""
    parts = [range(3), range(0), range(3, 7)]
    return [str(write_tar(tmp_path / f"{k}.tar", samples(part))) for k, part in enumerate(parts)]


@pytest.fixture
def indexed(monkeypatch):
    """The calls that make an index."""
    calls, index = [], shards._index
    monkeypatch.setattr(shards, "_index", lambda *options: calls.append(options) or index(*options))
    return calls


def test_images_are_read_by_number(tars):
    source = ShardSource(tars, TAR, "images")
    assert (len(source), source.name, source.encoded, source.channels) == (7, "images", True, 3)
    for k in (6, 0, 3, 2, 5):
        assert source.read(k).tobytes() == jpeg(k)
        assert source.read(k).dtype == np.uint8
        assert source.describe(k).startswith(f"{tars[0] if k < 3 else tars[2]}: {k:04}.jpg at byte ")
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (source.classes, source.damaged) == (("0", "1", "2"), {})
    assert source.offsets.nbytes + source.sizes.nbytes + source.labels.nbytes == 24 * 7


def test_labels_are_numbered_by_their_values(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrecord", [example(image=b"x", label=k) for k in (900, -5, 7, 900)])
    source = ShardSource([str(path)], TFRECORD, "a")
    assert (source.classes, source.labels.tolist()) == (("-5", "7", "900"), [2, 0, 1, 2])
    held_out = ShardSource([str(path)], TFRECORD, "a", classes=("7", "900", "3", "-5"))
    assert held_out.labels.tolist() == [1, 3, 0, 1]
    with pytest.raises(DataError, match="class '900' is not among the training classes"):
        ShardSource([str(path)], TFRECORD, "a", classes=("7", "-5"))
    assert ShardSource([str(path)], TFRECORD, "a", classes=()).labels is None


def test_single_value_is_no_label_without_classes(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", samples((0, 3))))
    assert (ShardSource([path], TAR, "a").labels, ShardSource([path], TAR, "a").classes) == (None, ())
    assert ShardSource([path], TAR, "a", classes=("0", "1")).labels.tolist() == [0, 0]


def test_labels_of_some_images_are_left_out(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", [*samples((0, 1)), *samples((2, 3), None)])
    source = ShardSource([str(path)], TAR, "part")
    assert (source.labels, source.classes, len(source)) == (None, (), 4)
    (line,) = caplog.messages
    assert line.startswith("part: 2 of 4 images have no label")
    assert f"{path}: 0002.jpg at byte " in line


def test_shard_that_changes_is_an_os_error(tars):
    source = ShardSource(tars, TAR, "images")
    os.truncate(tars[0], 600)
    with pytest.raises(OSError, match="shorter"):
        source.read(0)
    os.remove(tars[2])
    with pytest.raises(FileNotFoundError):
        source.read(3)
    assert source.describe(3) == f"{tars[2]}: image at byte 512"
    with pytest.raises(DataError, match=r"^gone\.tar: .*No such file"):
        ShardSource([tars[0], "gone.tar"], TAR, "images")


def test_index_is_cached_until_the_shards_change(tars, tmp_path, indexed):
    os.truncate(tars[2], 6000)
    folder = tmp_path / "run/index"
    first, second = (ShardSource(tars, TAR, "images", cache=folder) for _ in range(2))
    assert len(indexed) == len(list(folder.iterdir())) == 1
    for name in ("offsets", "sizes", "labels", "_ends"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()
    assert (first.damaged, list(first.damaged)) == (second.damaged, [tars[2]])
    write_tar(tmp_path / "1.tar", samples((7, 8)))
    assert len(ShardSource(tars, TAR, "images", cache=folder)) == len(first) + 2
    assert len(ShardSource(tars[:2], TAR, "images", cache=folder)) == 5
    assert len(indexed) == 3


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04 cut"])
def test_corrupt_cached_index_is_made_again(tars, tmp_path, indexed, content):
    ShardSource(tars, TAR, "images", cache=tmp_path / "index")
    (cached,) = (tmp_path / "index").iterdir()
    cached.write_bytes(content)
    for _ in range(2):
        assert len(ShardSource(tars, TAR, "images", cache=tmp_path / "index")) == 7
    assert len(indexed) == 2


def test_folder_that_cannot_cache_the_index_is_reported(tars, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    assert len(ShardSource(tars, TAR, "images", cache=tmp_path / "file/index")) == 7
    assert [message.startswith(f"{tmp_path}/file/index: ") for message in caplog.messages] == [True]
