"""The data set is opened once. Two ranks: tests/distributed/test_failing_ranks.py."""

import pickle

import pytest

from fasttrain.config.resolve import resolve
from fasttrain.distributed.world import World
from fasttrain.errors import DataError
from fasttrain.pipelines import open_source
from fasttrain.training.opening import open_together
from tests.pipelines.sources.shard_files import samples, write_tar


def test_one_rank_opens_the_data_itself(images, tmp_path):
    train = resolve("simclr", {"recipe": "cifar", "data_path": str(images)}).train
    assert open_together(train, tmp_path, World(0, 1, 0, 1)).summary == open_source(str(images)).summary
    with pytest.raises(DataError, match="no such folder"):
        open_together(resolve("simclr", {"data_path": str(tmp_path / "none")}).train, tmp_path, World(0, 1, 0, 1))


def test_opened_data_can_be_sent_to_other_ranks(images, tmp_path):
    write_tar(tmp_path / "0.tar", samples(range(5)))
    for path in (str(images), str(tmp_path / "0.tar"), [str(images), str(tmp_path / "0.tar")], None):
        splits = open_source(path)
        received = pickle.loads(pickle.dumps(splits))
        assert received.summary == splits.summary
        last = len(splits.train) - 1
        assert (received.train.read(last) == splits.train.read(last)).all()
        assert received.train.describe(last) == splits.train.describe(last)
