import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.pipelines import ArraySource, DataError, FolderSource, Subset


def write(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / file, "PNG")
    return root


def names(source):
    return [Path(source.describe(i)).name for i in range(len(source))]


def test_folder_takes_sub_folders_as_classes(tmp_path):
    images = ("dog/b.PNG", "dog/a.jpg", "cat/v1.0/er/c.0031.JPEG", "cat/d.bmp", "cat/e.webp", "cat/f.Tif", "cat/g.tiff")
    write(tmp_path, *images, "dog/.hidden.jpg", ".git/a.jpg")
    for ignored in ("dog/notes.txt", "empty/readme.md"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("no image")
    source = FolderSource(tmp_path)
    assert source.classes == ("cat", "dog")
    assert names(source) == ["d.bmp", "e.webp", "f.Tif", "g.tiff", "c.0031.JPEG", "a.jpg", "b.PNG"]
    assert source.labels.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert source.labels.dtype == np.int64
    assert source.read(5).tobytes() == (tmp_path / "dog/a.jpg").read_bytes()
    assert (source.encoded, source.channels, source.name) == (True, 3, tmp_path.name)


def test_numpy_files_are_images_only_without_others(tmp_path):
    write(tmp_path, "cat/a.npy", "dog/b.NPY")
    assert names(FolderSource(tmp_path)) == ["a.npy", "b.NPY"]
    write(tmp_path, "cat/c.png", "dog/d.png", "labels.npy")
    source = FolderSource(tmp_path)
    assert (names(source), source.labels.tolist()) == (["c.png", "d.png"], [0, 1])


@pytest.mark.parametrize("files", [("b.jpg", "a.png", "more/c.jpg"), ("images/a.jpg",)])
def test_folder_without_several_classes_has_no_labels(tmp_path, files):
    source = FolderSource(write(tmp_path, *files))
    assert (names(source), source.labels, source.classes) == (sorted(Path(file).name for file in files), None, ())


def test_folder_follows_links_but_not_in_circles(tmp_path):
    write(tmp_path, "data/a/1.jpg", "elsewhere/2.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/b")
    os.symlink(tmp_path / "data/a", tmp_path / "data/a/again")
    source = FolderSource(tmp_path / "data")
    assert (names(source), source.labels.tolist()) == (["1.jpg", "2.jpg"], [0, 1])


@pytest.mark.parametrize(
    ("shape", "dtype", "labels"),
    [((2, 4, 4, 3), complex, 2), ((2, 4, 4), np.uint8, 2), ((2, 4, 4, 17), np.uint8, 2), ((2, 4, 4, 3), np.uint8, 3)],
)
def test_array_of_another_shape_is_an_error(shape, dtype, labels):
    with pytest.raises(DataError, match=r"^thing: (images|labels) are .*; give "):
        ArraySource(np.zeros(shape, dtype), np.zeros(labels, np.int64), name="thing")


def test_subset_renumbers_the_images():
    source = ArraySource(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), [0, 1, 2, 0, 1], "abc", "thing")
    subset = Subset(Subset(source, [4, 0, 3]), [2, 0])
    assert [subset.read(i).item() for i in range(len(subset))] == [3, 4]
    assert (subset.labels.tolist(), subset.classes, subset.channels, subset.encoded) == ([0, 1], tuple("abc"), 1, False)
    assert (subset.describe(1), subset.stamp(1)) == ("thing 4", source.stamp(4))
