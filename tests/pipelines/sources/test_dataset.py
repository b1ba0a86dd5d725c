import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fasttrain.pipelines import DataError, source_from_dataset

from .shard_files import jpeg, picture


class Items(Dataset):
    """Items as they are given; those that are exceptions are raised. Counts what is asked for."""

    def __init__(self, items):
        self.items, self.asked = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.asked.append(i)
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.dstack([RGB, GREY])


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (RGB, RGB),
        (GREY, GREY[..., None]),
        (GREY[..., None], GREY[..., None]),
        (ALPHA, RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(GREY), GREY[..., None]),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), GREY[..., None]),
        (Image.fromarray(ALPHA), RGB),
        (Image.fromarray(GREY > 99), (255 * (GREY > 99))[..., None]),
        (Image.fromarray(GREY.astype(np.uint16) * 257), GREY[..., None]),
        (Image.fromarray(RGB).convert("CMYK"), RGB),
        (Image.fromarray(RGB).quantize(64), np.array(Image.fromarray(RGB).quantize(64).convert("RGB"))),
    ],
)
@pytest.mark.parametrize("form", ["image", "pair"])
def test_pixels_of_every_form(image, pixels, form):
    source = source_from_dataset(Items([image if form == "image" else (image, 3)]), labelled=False)
    assert source.read(0).tolist() == pixels.tolist()
    assert source.read(0).flags.c_contiguous
    assert (source.encoded, source.channels, source.labels) == (False, pixels.shape[-1], None)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)])
def test_encoded_bytes(kind):
    source = source_from_dataset(Items([kind(jpeg(k)) for k in range(2)]))
    assert (source.encoded, source.channels, len(source)) == (True, 3, 2)
    assert source.read(1).tobytes() == jpeg(1)
    assert Image.open(io.BytesIO(source.read(1))).size == picture(1).size


def test_names():
    source = source_from_dataset(Items([RGB] * 2), name="thing", classes=("a", "b"))
    assert (source.name, source.describe(1), source.classes) == ("thing", "thing 1", ("a", "b"))
    assert source_from_dataset(Items([RGB])).describe(0) == "Items 0"


def test_labels_that_are_given_or_told():
    data = Items([(RGB, k) for k in range(4)])
    assert source_from_dataset(data, labels=[3, 2, 1, 0]).labels.tolist() == [3, 2, 1, 0]
    data.targets = [5, 6, 7, 8]
    assert source_from_dataset(data).labels.tolist() == [5, 6, 7, 8]
    assert source_from_dataset(Subset(data, [2, 0])).labels.tolist() == [7, 5]
    assert source_from_dataset(ConcatDataset([data, Subset(data, [3])])).labels.tolist() == [5, 6, 7, 8, 8]
    assert set(data.asked) <= {0, 2}  # one item of each, to see what it is
    data.labels = torch.arange(4)
    del data.targets
    assert source_from_dataset(data).labels.tolist() == [0, 1, 2, 3]
    assert source_from_dataset(data).labels.dtype == np.int64


def test_labels_that_only_the_items_have_are_read_with_a_line(caplog):
    data = Items([(RGB, torch.tensor(k)) for k in range(4)])
    assert source_from_dataset(data).labels.tolist() == [0, 1, 2, 3]
    line = "Items: no targets and no labels, so all 4 items are read once for theirs"
    assert [record.getMessage() for record in caplog.records] == [line]
    both = ConcatDataset([data, Subset(data, [1])])
    assert source_from_dataset(both).labels.tolist() == [0, 1, 2, 3, 1]


def test_negative_labels_are_none(caplog):
    """STL-10 says so of images without a label; as a class they broke the k-NN."""
    data = Items([(RGB, k) for k in range(4)])
    data.labels = np.array([0, -1, 2, -1])
    assert source_from_dataset(data).labels is None
    line = "Items: 2 of 4 labels are negative, so unknown; all labels are left out"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_items_without_labels(caplog):
    images = TensorDataset(torch.zeros(3, 3, 4, 4, dtype=torch.uint8))  # its items are tuples of one
    assert source_from_dataset(images).labels is None
    assert source_from_dataset(images).read(2).shape == (4, 4, 3)
    assert source_from_dataset(Items([RGB])).labels is None
    assert caplog.records == []


@pytest.mark.parametrize("labels", [[1, 2], [[1], [2], [3]], [0.5, 1.5, 2.5], ["a", "b", "c"]])
def test_labels_of_another_kind(labels):
    with pytest.raises(DataError, match=r"Items: labels are .*; give a whole number for each of the 3 images"):
        source_from_dataset(Items([RGB] * 3), labels=labels)


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (RGB.astype(np.float32), "the image is float32 [5, 7, 3]; give a PIL image"),
        (torch.zeros(3, 5, 7), "the image is torch.float32 [3, 5, 7]; give"),
        (torch.from_numpy(RGB), "the image is torch.uint8 [5, 7, 3]; give"),
        (np.zeros((5, 7, 2), np.uint8), "the image is uint8 [5, 7, 2]; give"),
        (np.zeros((0, 7, 3), np.uint8), "the image is uint8 [0, 7, 3]; give"),
        ("a.jpg", "the image is a str; give"),
        (Image.fromarray(RGB[..., 0].astype(np.float32)), "a PIL image of mode 'F' has no known range; convert it"),
    ],
)
def test_images_of_another_kind(image, what):
    with pytest.raises(DataError, match=re.escape(f"Items 0: {what}")):
        source_from_dataset(Items([image]))


def test_bytes_and_pixels_do_not_mix():
    source = source_from_dataset(Items([RGB, jpeg(0)]))
    with pytest.raises(DataError, match="Items 1: the items are bytes here and pixels there; make them all one"):
        source.read(1)


def test_items_that_cannot_be_read():
    source = source_from_dataset(Items([OSError("gone"), (RGB, 7)]))
    assert (source.channels, source.labels.tolist()) == (3, [0, 7])
    with pytest.raises(OSError, match="gone"):
        source.read(0)
    with pytest.raises(DataError, match="Items: none of its 1 items can be read; gone"):
        source_from_dataset(Items([OSError("gone")]))
    with pytest.raises(DataError, match="Items: the data set is empty"):
        source_from_dataset(Items([]))
