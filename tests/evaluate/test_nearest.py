"""A short list in bf16 changes nothing that is found, however close the features lie."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.evaluate.nearest import Nearest, _highest, nearest


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """On every machine, whether they pay there or not."""
    monkeypatch.setattr("fasttrain.evaluate.nearest._bf16_is_faster", lambda device: True)


def _are_nearest(bank, queries, k, cosines, found):
    """Equal to fp64 as far as fp32 tells rows apart: the k-th and the next may change places within its rounding."""
    exact = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    expected = exact.topk(k, dim=1).values
    torch.testing.assert_close(cosines.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.gather(1, found), expected, atol=1e-6, rtol=0)
    assert all(len(set(row)) == k for row in found.tolist())


def _drawn(rows, spread, seed, width=24):
    """Features around a common direction: the smaller ``spread``, the closer to each other all of them lie."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return common + spread * torch.randn(rows, width, generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([3.0, 1.0, 0.1, 1e-2, 1e-3]), st.integers(1, 40), st.integers(0, 1000))
def test_the_nearest_are_those_of_fp64(spread, k, seed):
    bank, queries = _drawn(300, spread, seed), _drawn(31, spread, seed + 1)
    _are_nearest(bank, queries, k, *Nearest(bank)(queries, k))


def test_lists_are_used_where_rows_are_apart_and_given_up_where_they_are_not(monkeypatch):
    whole = []
    among_all = Nearest._among_all
    monkeypatch.setattr(
        Nearest, "_among_all", lambda self, rows, k: whole.append(len(rows)) or among_all(self, rows, k)
    )
    apart, close = Nearest(_drawn(2000, 3.0, 0)), Nearest(_drawn(2000, 1e-3, 0))
    for search, spread, expected in ((apart, 3.0, []), (close, 1e-3, [50, 50])):
        for _ in range(2):
            search(_drawn(50, spread, 1), 3)
        assert whole == expected
        whole.clear()


def test_what_the_bound_leaves_open_is_compared_with_all():
    """Rows that bf16 takes for equal, the nearest of which is in no list."""
    bank = torch.zeros(200, 2)
    bank[:, 0], bank[:, 1] = 1, torch.linspace(0.5, 0.502, 200)
    assert len(bank.bfloat16().unique(dim=0)) < 3
    _, found = Nearest(bank)(torch.tensor([[0.0, 1.0]]), 2)
    assert found.tolist() == [[199, 198]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 30), st.sampled_from([3, 1000]), st.integers(0, 1000))
def test_the_highest_are_those_of_topk(columns, k, values, seed):
    """Equal values too, of which any may be taken, and columns that make no whole group."""
    scores = torch.randint(values, (7, columns), generator=torch.Generator().manual_seed(seed)).float()
    k = min(k, columns)
    highest, at = _highest(scores, k)
    assert torch.equal(highest.sort(descending=True).values, scores.topk(k).values)
    assert torch.equal(scores.gather(1, at), highest)
    assert all(len(set(row)) == k for row in at.tolist())


def test_features_that_are_not_numbers_are_no_error():
    bank = _drawn(200, 1.0, 0)
    queries = bank[:3].clone()
    queries[1] = torch.nan
    _, found = Nearest(bank)(queries, 2)
    assert found[[0, 2], 0].tolist() == [0, 2]


@pytest.mark.parametrize("k", [1, 20, 50])
def test_a_bank_that_passes_by_in_blocks_gives_the_same(k, monkeypatch):
    """As one in the host's memory does for queries on a GPU; some blocks have fewer rows than are asked for.

    Not the same to the last bit: on some CPUs a product of fewer rows is summed in another order.
    """
    bank, queries = _drawn(310, 1.0, 0), _drawn(31, 1.0, 1)
    _are_nearest(bank, queries, k, *nearest(bank, queries, k, chunk=7))
    monkeypatch.setattr("fasttrain.evaluate.nearest._blocks", lambda bank, device: iter(bank.split(30)))
    _are_nearest(bank, queries, k, *nearest(bank, queries, k, chunk=7))
