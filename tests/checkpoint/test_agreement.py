"""Threads of several ranks succeed together or fail together."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fasttrain.checkpoint import agreement
from fasttrain.checkpoint.agreement import Agreement
from fasttrain.distributed.world import World
from fasttrain.errors import SaveError


@pytest.fixture
def ranks(monkeypatch):
    """The agreements of three ranks in one process."""
    store = dist.HashStore()
    monkeypatch.setattr(agreement, "_get_default_store", lambda: SimpleNamespace(clone=lambda: store))
    monkeypatch.setattr(agreement, "all_gather_object", lambda world, value: ["name"] * world.size)
    return [Agreement(World(rank, 3, rank, 3)) for rank in range(3)]


def _run(ranks, actions):
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(rank.run, action) for rank, action in zip(ranks, actions, strict=True)]
        return [future.exception() or future.result() for future in futures]


def test_first_rank_gets_all_results(ranks):
    for round_ in range(2):
        results = _run(ranks, [lambda k=k, r=round_: [k, r] for k in range(3)])
        assert results == [[[k, round_] for k in range(3)], [], []]


def test_one_ranks_error_is_every_ranks_error(ranks):
    def full():
        raise OSError(28, "No space left on device", "file")

    for failing in range(3):
        errors = _run(ranks, [full if rank == failing else list for rank in range(3)])
        assert [str(error) for error in errors] == ["No space left on device: file"] * 3
        assert {type(error) for error in errors} == {SaveError}


def test_a_bug_of_one_rank_is_raised_there_as_it_is(ranks):
    first, second, third = _run(ranks, [list, lambda: [][0], list])
    assert isinstance(second, IndexError)
    assert [str(first), str(third)] == ["IndexError: list index out of range"] * 2
