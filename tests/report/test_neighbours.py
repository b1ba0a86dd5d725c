"""Neighbours are scikit-learn's, and the images shown differ."""

from types import SimpleNamespace

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from fasttrain.report.neighbours import choose, nearest


def test_nearest_matches_scikit_learn_without_the_query():
    rows = torch.nn.functional.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines, indices = nearest(rows, [3, 17, 59], 5)
    theirs = NearestNeighbors(n_neighbors=6, metric="cosine").fit(rows.numpy())
    distances, expected = theirs.kneighbors(rows[[3, 17, 59]].numpy())
    assert indices.tolist() == expected[:, 1:].tolist()
    np.testing.assert_allclose(1 - cosines.numpy(), distances[:, 1:], atol=1e-6)
    assert [sorted(row) for row in nearest(torch.ones(3, 1), [0, 1], 6)[1].tolist()] == [[1, 2], [0, 2]]


def test_choose_takes_classes_in_turn_or_spaces_evenly():
    sample = SimpleNamespace(labels=[5, 5, 5, 2, 9, 2], source=range(6))
    assert choose(sample, 4) == [3, 0, 4, 5]
    assert choose(sample, 99) == [3, 0, 4, 5, 1, 2]
    assert choose(SimpleNamespace(labels=None, source=range(100)), 4) == [0, 25, 50, 75]
    assert choose(SimpleNamespace(labels=None, source=range(2)), 4) == [0, 1]
