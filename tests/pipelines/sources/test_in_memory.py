import numpy as np
import pytest
import torch

from fasttrain.errors import ConfigError
from fasttrain.pipelines import ArraySource, Splits
from fasttrain.pipelines.sources.in_memory import as_paths, in_memory_splits

from .test_dataset import RGB, Items
from .test_hugging_face import labelled


def array(count, classes=()):
    return ArraySource(np.zeros((count, 4, 4, 3), np.uint8), np.arange(count) % 2, classes)


@pytest.mark.parametrize(
    ("data", "images", "name"),
    [
        ([RGB, RGB], 2, "list"),  # a list of images is one data set
        ([(RGB, 0), (RGB, 1)], 2, "list"),
        ([{"image": RGB, "label": 1}], 1, "list"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 4, "Tensor"),
        ([array(2), Items([RGB, RGB])], 4, "array + Items"),
        ((array(2), Splits("s", array(3), None), labelled(4)), 9, "array + s + Dataset"),
        ({"train": labelled(3), "test": labelled(2)}, 3, "train"),
    ],
)
def test_lists_of_data_sets_are_mixtures(data, images, name):
    splits = in_memory_splits(data, None)
    assert (len(splits.train), splits.train.name) == (images, name)


def test_paths_stay_paths(tmp_path):
    for data, paths in ((None, None), ("a", ["a"]), (["a", tmp_path], ["a", str(tmp_path)])):
        assert in_memory_splits(data, None) is None
        assert as_paths(data) == paths


def test_held_out_labels_count_in_the_training_classes():
    """Regression: names of held-out labels were numbered on their own."""
    train = Items([(RGB, name) for name in ("ant", "bee", "cat")])
    val = Items([(RGB, name) for name in ("cat", "bee")])
    splits = in_memory_splits(train, val)
    assert (splits.val.labels.tolist(), splits.val.classes) == ([2, 1], ("ant", "bee", "cat"))
    splits = in_memory_splits([train, array(2, ("bee", "dog"))], [val, array(2, ("dog", "ant"))])
    assert splits.train.labels.tolist() == [0, 1, 2, 1, 3]
    assert splits.val.labels.tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize(
    ("data", "val", "weights", "flag"),
    [
        ({"train": labelled(2), "test": labelled(2)}, array(2), (), "val"),
        ([array(2), "/images"], "/val", (), "val"),
        ([array(2), array(2)], None, (1,), "--data_weights"),
        (array(2), None, (1, 2), "--data_weights"),
        (5, None, (), "data"),
    ],
)
def test_unclear_combination_is_refused(data, val, weights, flag):
    with pytest.raises(ConfigError, match=f"^{flag}: "):
        in_memory_splits(data, val, weights)
