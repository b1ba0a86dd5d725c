"""Lockstep on one rank. Two ranks: tests/distributed/test_two_ranks.py."""

import numpy as np
import pytest
import torch

from fasttrain.distributed.lockstep import in_step, of_all_ranks
from fasttrain.pipelines import ArraySource, DataError, Loader, View, ViewRecipe


@pytest.fixture
def loader():
    source = ArraySource(np.random.default_rng(0).integers(0, 256, (20, 5, 5, 1), dtype=np.uint8))
    made = Loader(source, ViewRecipe((View(4),), 1, (0.0,), (1.0,)), 4, max_bad_fraction=0.01)
    yield made
    made.close()


def test_one_rank_has_the_loaders_batches(loader):
    expected = [batch.indices.tolist() for batch in loader.epoch(3, 2)]
    assert [batch.indices.tolist() for batch in in_step(loader, 3, 2)] == expected
    assert len(expected) == 3


def test_an_abandoned_epoch_can_start_again(loader):
    batches = in_step(loader, 0)
    first = next(batches)
    batches.close()
    assert torch.equal(next(in_step(loader, 0)).views[0], first.views[0])


def test_a_data_error_is_raised(loader):
    def read(i):
        raise OSError("gone")

    loader.source.read = read
    with pytest.raises(DataError, match="images cannot be read"):
        list(in_step(loader, 0))


def test_names_of_one_rank_are_returned():
    assert of_all_ranks({"a", "b"}, 1) == {"a", "b"}
