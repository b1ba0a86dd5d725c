"""Lockstep on one rank. Two ranks: tests/distributed/test_two_ranks.py."""

import numpy as np
import pytest
import torch

from fasttrain.distributed.lockstep import Feed, in_step, of_all_ranks
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


def test_feed_of_several_ranks_continues_with_black_batches(loader):
    """A rank whose data fails keeps in step until the guard's reduction reports it to all ranks."""
    expected = [batch.indices.tolist() for batch in loader.epoch(3, 2)]
    feed = Feed(loader, 3, 2)
    assert feed.next().indices.tolist() == expected[0]
    loader.world_size = 2
    feed._batches = iter_of_failure()
    for _ in range(2):
        black = feed.next()
        assert black.views[0].shape == (1, 4, 1, 4, 4)
        assert not black.views[0].any()
        assert black.indices.tolist() == [0] * 4
    assert str(feed.failure) == "no images"


def test_feed_of_one_rank_raises_the_error(loader):
    feed = Feed(loader, 0)
    feed._batches = iter_of_failure()
    with pytest.raises(DataError, match="no images"):
        feed.next()


def iter_of_failure():
    raise DataError("no images")
    yield


def test_names_of_one_rank_are_returned():
    assert of_all_ranks({"a", "b"}, 1) == {"a", "b"}
