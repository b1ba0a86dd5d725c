"""Garbage is collected at the same steps on all ranks, and as before outside of the loop."""

import gc

import pytest

from fasttrain.training.garbage import GarbageCollection


@pytest.fixture
def collections(monkeypatch):
    """The generations of all explicit collections."""
    generations = []
    monkeypatch.setattr(gc, "collect", generations.append)
    return generations


def test_ranks_collect_at_fixed_steps_only(collections):
    with GarbageCollection(2) as garbage:
        assert not gc.isenabled()
        for step in range(1, 121):
            garbage.step_done(step, ends_epoch=step == 120)
    assert collections == [1, 1, 2]
    assert gc.isenabled()


def test_one_rank_collects_as_before(collections):
    with GarbageCollection(1) as garbage:
        assert gc.isenabled()
        garbage.step_done(50, ends_epoch=True)
    assert collections == []


def test_collection_stays_off_in_a_program_that_turned_it_off(collections):
    gc.disable()
    try:
        with pytest.raises(RuntimeError), GarbageCollection(2):
            raise RuntimeError
        assert not gc.isenabled()
    finally:
        gc.enable()
