"""The nearest neighbours match an fp64 reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.evaluate import nearest as module
from fasttrain.evaluate.nearest import nearest


def _assert_nearest(bank, queries, k, **options):
    """Compare with fp64. Rows whose cosines differ by less than fp32's rounding may change places."""
    cosines, rows = nearest(bank, queries, k, **options)
    exact = F.normalize(queries.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    expected = exact.topk(k, dim=1).values
    torch.testing.assert_close(cosines.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.gather(1, rows), expected, atol=1e-6, rtol=0)
    assert all(len(set(row)) == k for row in rows.tolist())


def _rows(count, spread, seed, width=24):
    """Return rows around a common direction. A small ``spread`` makes them nearly the same."""
    common = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return common + spread * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([3.0, 0.1, 1e-3]), st.integers(1, 40), st.integers(0, 1000), st.sampled_from([7, 256]))
def test_nearest_matches_fp64(spread, k, seed, chunk):
    _assert_nearest(_rows(300, spread, seed), _rows(31, spread, seed + 1), k, chunk=chunk)


@pytest.mark.parametrize("k", [1, 20, 50])
def test_nearest_in_blocks_matches_fp64(k, monkeypatch):
    """A bank in another memory arrives in blocks. Some blocks have fewer rows than k."""
    monkeypatch.setattr(module, "_blocks", lambda bank, device: iter(bank.split(30)))
    _assert_nearest(_rows(310, 1.0, 0), _rows(31, 1.0, 1), k, chunk=7)


def test_nearest_with_nan_queries_returns_the_other_rows():
    bank = _rows(200, 1.0, 0)
    queries = bank[:3].clone()
    queries[1] = torch.nan
    assert nearest(bank, queries, 2)[1][[0, 2], 0].tolist() == [0, 2]
    assert nearest(bank, queries, 500)[0].shape == (3, 200)
