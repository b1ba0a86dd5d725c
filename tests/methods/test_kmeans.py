import pytest
import torch
from torch.nn.functional import normalize, one_hot

from fasttrain.methods.kmeans import spherical_kmeans


def _bunches(centers=5, each=40, dim=16, noise=0.02):
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(centers, dim, generator=generator), dim=1)
    of = torch.arange(centers).repeat_interleave(each)
    return normalize(directions[of] + noise * torch.randn(len(of), dim, generator=generator), dim=1), of


def _written_out(rows, clusters, iterations):
    centroids = rows[torch.randperm(len(rows))[:clusters]]
    for _ in range(iterations):
        member = one_hot((rows @ centroids.T).argmax(1), clusters).to(rows)
        sums = member.T @ rows
        kept = member.sum(0) > 0
        centroids = torch.where(kept[:, None], sums / sums.norm(dim=1, keepdim=True).clamp_min(1e-12), centroids)
    return centroids, (rows @ centroids.T).argmax(1)


@pytest.mark.parametrize("clusters", [1, 5, 7, 200])
def test_equals_the_plain_algorithm(clusters):
    rows, _ = _bunches()
    torch.manual_seed(3)
    centroids, result = spherical_kmeans(rows.double(), clusters, iterations=4)
    torch.manual_seed(3)
    expected, assigned = _written_out(rows.double(), clusters, 4)
    torch.testing.assert_close(centroids, expected)
    assert torch.equal(result, assigned)


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
