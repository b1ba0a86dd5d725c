import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.pipelines import ArraySource, DataError, FolderSource


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


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 2), np.uint8)]
)
def test_arrays_of_another_shape(images):
    with pytest.raises(DataError, match=r"give uint8 \[N, H, W, C\] with N >= 1 and 1 or 3 channels"):
        ArraySource(images)


def test_labels_of_another_length():
    with pytest.raises(DataError, match=r"labels are int64 \[3\]; give a whole number for each of the 2 images"):
        ArraySource(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))
