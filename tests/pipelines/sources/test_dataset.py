import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fasttrain.pipelines import DataError, source_from_dataset

from .shard_files import jpeg


class Items(Dataset):
    """A data set of a list. It raises the items that are exceptions, and records the numbers that are read."""

    def __init__(self, items):
        self.items, self.read = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read.append(i)
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.dstack([RGB, GREY])
DEEP = np.dstack([RGB] * 4 + [GREY]).astype(np.uint16) * 16  # 13 channels


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (RGB, RGB),
        (GREY, GREY[..., None]),
        (GREY[..., None], GREY[..., None]),
        (ALPHA, ALPHA),
        (DEEP, DEEP),
        (torch.from_numpy(DEEP).permute(2, 0, 1), DEEP),
        (torch.from_numpy(DEEP / 2).permute(2, 0, 1), DEEP / 2),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(GREY), GREY[..., None]),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), GREY[..., None]),
        (Image.fromarray(ALPHA), RGB),
        (Image.fromarray(GREY > 99), (255 * (GREY > 99))[..., None]),
        (Image.fromarray(DEEP[..., 0]), DEEP[..., :1]),
        (Image.fromarray(DEEP[..., 0].astype(np.float32)), DEEP[..., :1]),
        (Image.fromarray(RGB).convert("CMYK"), RGB),
        (Image.fromarray(RGB).quantize(64), np.array(Image.fromarray(RGB).quantize(64).convert("RGB"))),
    ],
)
@pytest.mark.parametrize("pair", [False, True])
def test_pixels_of_every_form_are_read(image, pixels, pair):
    source = source_from_dataset(Items([(image, 3) if pair else image]), labelled=False)
    assert source.read(0).tolist() == pixels.tolist()
    assert source.read(0).flags.c_contiguous
    assert (source.encoded, source.channels, source.labels) == (False, pixels.shape[-1], None)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)])
def test_encoded_bytes_are_read(kind):
    source = source_from_dataset(Items([kind(jpeg(k)) for k in range(2)]), classes="ab")
    assert (source.encoded, source.channels, len(source), source.classes) == (True, 3, 2, ("a", "b"))
    assert source.describe(0) == "Items 0"
    assert source.read(1).tobytes() == jpeg(1)


def test_labels_come_from_argument_or_attributes():
    data = Items([(RGB, k) for k in range(4)])
    assert source_from_dataset(data, labels=[3, 2, 1, 0]).labels.tolist() == [3, 2, 1, 0]
    data.targets = [5, 6, 7, 8]
    assert source_from_dataset(data).labels.tolist() == [5, 6, 7, 8]
    assert source_from_dataset(Subset(data, [2, 0])).labels.tolist() == [7, 5]
    assert source_from_dataset(ConcatDataset([data, Subset(data, [3])])).labels.tolist() == [5, 6, 7, 8, 8]
    assert set(data.read) <= {0, 2}  # one item of each, for its form
    data.labels = torch.arange(4)
    del data.targets
    assert source_from_dataset(data).labels.tolist() == [0, 1, 2, 3]
    assert source_from_dataset(data).labels.dtype == np.int64


def test_labels_of_items_are_read_with_a_warning(caplog):
    data = Items([(RGB, torch.tensor(k)) for k in range(4)])
    assert source_from_dataset(ConcatDataset([data, Subset(data, [1])])).labels.tolist() == [0, 1, 2, 3, 1]
    assert ["all 5 items" in message for message in caplog.messages] == [True]


def test_negative_labels_are_left_out(caplog):
    """Regression: STL-10 marks images without a label by -1, and as a class they broke the k-NN."""
    data = Items([(RGB, k) for k in range(4)])
    data.labels = np.array([0, -1, 2, -1])
    assert source_from_dataset(data).labels is None
    assert [message.startswith("Items: 2 of 4 labels") for message in caplog.messages] == [True]


def test_items_without_labels_give_none(caplog):
    images = source_from_dataset(TensorDataset(torch.zeros(3, 3, 4, 4, dtype=torch.uint8)))  # items are tuples of one
    assert (images.labels, images.read(2).shape, caplog.records) == (None, (4, 4, 3), [])
    assert (source_from_dataset(Items([RGB])).labels, caplog.records) == (None, [])


BOXES = {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2)}


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ([BOXES] * 3, "dict"),
        ([[BOXES]] * 3, "list"),
        ([torch.zeros(40, dtype=torch.int64)] * 3, r"array int64 \[40\]"),
        ([None] * 3, "None"),
        ([0, None, 1], "None"),
        ([0.5, 1.0, 2.0], "fraction"),
        ([torch.tensor(0.5)] * 3, "array float32"),
        ([("cat", "dog")] * 3, "tuple"),
        ([Image.fromarray(GREY)] * 3, "Image"),
    ],
)
@pytest.mark.parametrize("attribute", [False, True])
def test_targets_that_are_no_classes_train_without_labels(targets, reason, attribute, caplog):
    """Regression: boxes, attributes and None ended the training."""
    data = Items([(RGB, target) for target in targets])
    if attribute:
        data.targets = targets
    source = source_from_dataset(data)
    assert (source.labels, source.classes, source.read(2).shape) == (None, (), RGB.shape)
    assert re.search(reason, source.listing.unlabelled)
    (line,) = [message for message in caplog.messages if "without labels" in message]
    assert re.search(f"^Items: .*{reason}", line)


@pytest.mark.parametrize(
    ("items", "labels", "classes"),
    [
        ([(RGB, "dog"), (RGB, "cat"), (RGB, "dog")], [1, 0, 1], ("cat", "dog")),
        ([(RGB, "dog", {"id": 3}, 0.5), (RGB, "cat", None, 1)], [1, 0], ("cat", "dog")),
        ([(RGB, torch.tensor([4])), (RGB, np.array([2]))], [4, 2], ()),
        ([(17, RGB, 1), (18, RGB, 0)], [1, 0], ()),
        ([{"image": RGB, "label": 1, "id": 5}, {"image": RGB, "label": 0, "id": 6}], [1, 0], ()),
        ([{"id": 5, "scan": RGB, "target": "x"}, {"id": 6, "scan": RGB, "target": "y"}], [0, 1], ("x", "y")),
        ([{"img": RGB}, {"img": RGB}], None, ()),
        ([(RGB,), (RGB,)], None, ()),
    ],
)
def test_items_of_every_shape_are_read(items, labels, classes):
    source = source_from_dataset(Items(items))
    assert source.read(1).tolist() == RGB.tolist()
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.classes == classes


def test_attributes_give_names_of_classes():
    data = Items([(RGB, k) for k in range(4)])
    data.targets = np.array([["b"], ["a"], ["b"], ["c"]])  # [N, 1]
    source = source_from_dataset(Subset(data, torch.tensor([0, 1, 3])))
    assert (source.labels.tolist(), source.classes) == ([1, 0, 2], ("a", "b", "c"))
    data.targets, data.classes = torch.tensor([2, 0, 1, 2]), ["x", "y", "z"]
    source = source_from_dataset(data)
    assert (source.labels.tolist(), source.classes) == ([2, 0, 1, 2], ("x", "y", "z"))
    data.targets = ["x", "y"]  # the names of the classes, not the labels of the images
    assert source_from_dataset(data).labels.tolist() == [0, 1, 2, 3]


def test_names_that_are_all_different_are_no_classes():
    """torchvision's VOCDetection has the paths of its annotations as targets."""
    data = Items([(RGB, {})] * 200)
    data.targets = [f"{k}.xml" for k in range(200)]
    assert "0.xml" in source_from_dataset(data).listing.unlabelled


def test_item_of_another_shape_is_an_error():
    source = source_from_dataset(Items([{"image": RGB}, {"scan": RGB}]))
    with pytest.raises(DataError, match="Items 1: has no 'image'"):
        source.read(1)


@pytest.mark.parametrize("labels", [[1, 2], [[1], [2], [3]], [0.5, 1.5, 2.5], ["a", None, "c"]])
def test_labels_of_another_kind_are_an_error(labels):
    with pytest.raises(DataError, match=r"^Items: labels are .* each of the 3 images"):
        source_from_dataset(Items([RGB] * 3), labels=labels)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (torch.zeros(3, 5, 7, dtype=torch.complex64), "torch.complex64 [3, 5, 7]"),
        (torch.zeros(20, 20, 3), "torch.float32 [20, 20, 3]"),
        (np.zeros((0, 7, 3), np.uint8), "uint8 [0, 7, 3]"),
        ("a.jpg", "a str"),
    ],
)
def test_image_of_another_kind_is_an_error(image, kind):
    with pytest.raises(DataError, match=f"^Items 0: .*{re.escape(kind)}"):
        source_from_dataset(Items([image]))


def test_item_that_cannot_be_read_is_skipped():
    source = source_from_dataset(Items([OSError("gone"), (RGB, 7), (jpeg(0), 1)]))
    assert (source.channels, source.labels.tolist()) == (3, [0, 7, 1])
    with pytest.raises(OSError, match="gone"):
        source.read(0)
    with pytest.raises(DataError, match=r"^Items 2: "):  # bytes among pixels
        source.read(2)
    for items, reason in (([OSError("gone")], "none of its 1 items.*gone"), ([], "empty")):
        with pytest.raises(DataError, match=f"^Items: .*{reason}"):
            source_from_dataset(Items(items))


def test_error_of_a_data_set_names_the_item():
    """Its traceback came out of fasttrain.train."""

    class Broken(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            if i == 2:
                raise RuntimeError("boom")
            return np.zeros((4, 4, 3), np.uint8), 0

    with pytest.raises(DataError, match="Broken 2: .*boom"):
        source_from_dataset(Broken())
