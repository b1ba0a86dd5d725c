"""What happens on two ranks is in test_two_ranks.py."""

import numpy as np
import pytest
import torch

from fasttrain.distributed.lockstep import in_step, of_all_ranks
from fasttrain.pipelines import ArraySource, DataError, Loader, View, ViewRecipe

_RECIPE = ViewRecipe((View(4),), 1, (0.0,), (1.0,))


@pytest.fixture
def loader():
    source = ArraySource(np.random.default_rng(0).integers(0, 256, (20, 5, 5, 1), dtype=np.uint8))
    made = Loader(source, _RECIPE, 4, max_bad_fraction=0.01)
    yield made
    made.close()


def test_one_rank_has_the_loaders_batches(loader):
    expected = [batch.indices.tolist() for batch in loader.epoch(3, 2)]
    assert [batch.indices.tolist() for batch in in_step(loader, 3, 2)] == expected
    assert len(expected) == 3


def test_an_epoch_that_is_left_is_closed(loader):
    batches = in_step(loader, 0)
    first = next(batches)
    batches.close()
    assert loader._active.gi_frame is None
    assert torch.equal(next(in_step(loader, 0)).views[0], first.views[0])


def test_an_error_passes(loader):
    def read(i):
        raise OSError("gone")

    loader.source.read = read
    with pytest.raises(DataError, match=r"2 of 2 images cannot be read, more than the fraction 0\.01 allowed"):
        list(in_step(loader, 0))


def test_names_of_one_rank():
    assert of_all_ranks({"a", "b"}, 1) == {"a", "b"}
