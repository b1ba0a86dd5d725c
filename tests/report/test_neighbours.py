"""Neighbours are the nearest, and the images shown differ."""

from types import SimpleNamespace

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from fasttrain.report.neighbours import choose, nearest


def test_they_are_scikit_learns():
    rows = torch.nn.functional.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines, found = nearest(rows, [3, 17, 59], 5)
    theirs = NearestNeighbors(n_neighbors=6, metric="cosine").fit(rows.numpy())
    distances, indices = theirs.kneighbors(rows[[3, 17, 59]].numpy())
    assert found.tolist() == indices[:, 1:].tolist()  # the nearest of all is the image itself
    np.testing.assert_allclose(1 - cosines.numpy(), distances[:, 1:], atol=1e-6)


def test_few_images_have_few_neighbours_even_if_all_are_alike():
    rows = torch.ones(3, 1)
    _, found = nearest(rows, [0, 1], 6)
    assert [sorted(row) for row in found.tolist()] == [[1, 2], [0, 2]]


def test_a_class_each_in_turn_or_evenly():
    sample = SimpleNamespace(labels=[5, 5, 5, 2, 9, 2], source=range(6))
    assert choose(sample, 4) == [3, 0, 4, 5]
    assert choose(sample, 99) == [3, 0, 4, 5, 1, 2]
    assert choose(SimpleNamespace(labels=None, source=range(100)), 4) == [0, 25, 50, 75]
    assert choose(SimpleNamespace(labels=None, source=range(2)), 4) == [0, 1]
