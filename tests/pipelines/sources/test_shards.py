import logging
import os
import threading

import numpy as np
import pytest

from fasttrain.pipelines import DataError
from fasttrain.pipelines.sources import shards
from fasttrain.pipelines.sources.shards import ShardSource, Window
from fasttrain.pipelines.sources.tfrecord import TFRECORD
from fasttrain.pipelines.sources.webdataset import TAR

from .shard_files import example, imagenet_records, jpeg, samples, write_tar, write_tfrecord


@pytest.fixture
def tars(tmp_path):
    """Three shards of 3, 0 and 4 images."""
    parts = [range(3), range(0), range(3, 7)]
    return [str(write_tar(tmp_path / f"{k}.tar", samples(part))) for k, part in enumerate(parts)]


def test_reads_by_number(tars):
    source = ShardSource(tars, TAR, "images")
    assert (len(source), source.name, source.encoded, source.channels) == (7, "images", True, 3)
    for k in (6, 0, 3, 2, 5):
        assert source.read(k).tobytes() == jpeg(k)
        assert source.read(k).dtype == np.uint8
        assert source.describe(k).startswith(f"{tars[0] if k < 3 else tars[2]}: {k:04}.jpg at byte ")
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.classes == ("0", "1", "2")
    assert source.damaged == {}


def test_threads_read_at_once(tars):
    source, wrong = ShardSource(tars, TAR, "images"), []

    def read():
        wrong.extend(k for k in [*range(7)] * 20 if source.read(k).tobytes() != jpeg(k))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_labels_are_numbered_in_the_order_of_their_values(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrecord", [example(image=b"x", label=k) for k in (900, -5, 7, 900)])
    source = ShardSource([str(path)], TFRECORD, "a")
    assert (source.classes, source.labels.tolist()) == (("-5", "7", "900"), [2, 0, 1, 2])
    held_out = ShardSource([str(path)], TFRECORD, "a", classes=("7", "900", "3", "-5"))
    assert held_out.labels.tolist() == [1, 3, 0, 1]
    with pytest.raises(DataError, match="a: class '900' is not among the training classes; leave its images out"):
        ShardSource([str(path)], TFRECORD, "a", classes=("7", "-5"))
    assert ShardSource([str(path)], TFRECORD, "a", classes=()).labels is None


def test_one_value_is_no_label(tmp_path):
    path = str(write_tar(tmp_path / "a.tar", samples((0, 3))))
    assert (ShardSource([path], TAR, "a").labels, ShardSource([path], TAR, "a").classes) == (None, ())
    assert ShardSource([path], TAR, "a", classes=("0", "1")).labels.tolist() == [0, 0]


def test_labels_that_some_lack_are_left_out_with_a_line(tmp_path, caplog):
    paths = [
        str(write_tar(tmp_path / f"{k}.tar", samples((2 * k, 2 * k + 1), label)))
        for k, label in enumerate(("cls", None))
    ]
    source = ShardSource(paths, TAR, "part")
    assert (source.labels, source.classes, len(source)) == (None, (), 4)
    (line,) = [record.getMessage() for record in caplog.records]
    first = f"{paths[1]}: 0002.jpg at byte 512"
    assert line == f"part: 2 of 4 images have no label, the first is {first}; all labels are left out"


def test_a_shard_that_changes_or_goes(tars):
    source = ShardSource(tars, TAR, "images")
    os.truncate(tars[0], 600)
    with pytest.raises(OSError, match="the shard has become shorter"):
        source.read(0)
    os.remove(tars[2])
    with pytest.raises(FileNotFoundError):
        source.read(3)
    assert source.describe(3) == f"{tars[2]}: image at byte 512"


def test_a_shard_that_cannot_be_read(tars):
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read \(No such file or directory\); check the path"):
        ShardSource([*tars, "gone.tar"], TAR, "images")


@pytest.fixture
def count_indexed(monkeypatch):
    counted = []
    made = shards._index
    monkeypatch.setattr(shards, "_index", lambda *given: counted.append(given) or made(*given))
    return counted


def test_the_index_is_kept_and_found_again(tars, tmp_path, count_indexed):
    os.truncate(tars[2], 6000)
    folder = tmp_path / "run/index"
    sources = [ShardSource(tars, TAR, "images", cache=folder) for _ in range(2)]
    assert len(count_indexed) == 1
    for name in ("offsets", "sizes", "labels", "_ends"):
        assert getattr(sources[0], name).tolist() == getattr(sources[1], name).tolist()
    assert sources[0].damaged == sources[1].damaged
    assert list(sources[0].damaged) == [tars[2]]
    assert len(list(folder.iterdir())) == 1


def test_a_kept_index_that_is_no_longer_true(tars, tmp_path, count_indexed):
    ShardSource(tars, TAR, "images", cache=tmp_path / "index")
    write_tar(tmp_path / "1.tar", samples((7, 8)))
    assert len(ShardSource(tars, TAR, "images", cache=tmp_path / "index")) == 9
    assert len(ShardSource(tars[:2], TAR, "images", cache=tmp_path / "index")) == 5
    assert len(count_indexed) == 3


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04 cut"])
def test_a_kept_index_that_is_broken(tars, tmp_path, count_indexed, content):
    for _ in range(2):
        assert len(ShardSource(tars, TAR, "images", cache=tmp_path / "index")) == 7
    (kept,) = (tmp_path / "index").iterdir()
    kept.write_bytes(content)
    assert len(ShardSource(tars, TAR, "images", cache=tmp_path / "index")) == 7
    assert len(count_indexed) == 2
    assert len(kept.read_bytes()) > 100


def test_a_folder_that_cannot_keep_the_index(tars, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "fasttrain.data")
    (tmp_path / "file").write_text("in the way")
    assert len(ShardSource(tars, TAR, "images", cache=tmp_path / "file/index")) == 7
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/file/index: the index of the shards cannot be kept here (Not a directory)"
    ]


def test_window_is_the_file(tmp_path):
    data = np.random.default_rng(0).bytes(20000)
    (tmp_path / "file").write_bytes(data)
    with Window(tmp_path / "file") as window:
        assert window.length == 20000
        for at, count in [
            (0, 5),
            (3, 5000),
            (4000, 90),
            (4095, 2),
            (8191, 1),
            (19990, 50),
            (30000, 4),
            (0, 20001),
            (7, 0),
        ]:
            assert window.read(at, count) == data[at : at + count]


def test_the_index_is_small(tmp_path):
    path = write_tfrecord(tmp_path / "a.tfrecord", imagenet_records(range(20)))
    source = ShardSource([str(path)], TFRECORD, "a")
    assert source.offsets.nbytes + source.sizes.nbytes + source.labels.nbytes == 24 * 20
