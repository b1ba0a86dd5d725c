import pytest
import torch
from torch.nn.functional import normalize

from fasttrain.methods.kmeans import spherical_kmeans


def _bunches(centers=5, each=40, dim=16, noise=0.02):
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(centers, dim, generator=generator), dim=1)
    of = torch.arange(centers).repeat_interleave(each)
    return normalize(directions[of] + noise * torch.randn(len(of), dim, generator=generator), dim=1), of


def test_finds_bunches_that_lie_apart():
    rows, of = _bunches()
    torch.manual_seed(0)
    _, result = spherical_kmeans(rows, 12)
    for cluster in result.unique():
        assert len(of[result == cluster].unique()) == 1


def test_the_scores_come_in_blocks(monkeypatch):
    rows, _ = _bunches()
    torch.manual_seed(0)
    whole = spherical_kmeans(rows, 6)
    monkeypatch.setattr("fasttrain.methods.kmeans.SCORES", 30)
    torch.manual_seed(0)
    for a, b in zip(whole, spherical_kmeans(rows, 6), strict=True):
        torch.testing.assert_close(a, b)


def test_more_clusters_than_rows_are_refused():
    with pytest.raises(ValueError, match="9 clusters, got 8"):
        spherical_kmeans(torch.randn(8, 3), 9)
