import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier

from fasttrain.evaluate.knn import knn_accuracy


def _blobs(count, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, count)
    centres = np.random.default_rng(0).normal(size=(5, 8))
    return centres[labels] + generator.normal(size=(count, 8)), labels


def test_agrees_with_scikit_learn_on_the_same_votes():
    (bank, bank_labels), (queries, query_labels) = _blobs(400, 1), _blobs(157, 2)

    def weights(distances):  # squared distance of unit vectors is 2 - 2 cos
        return np.exp((1 - distances**2 / 2) / 0.07)

    reference = KNeighborsClassifier(20, weights=weights, algorithm="brute")
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    expected = reference.fit(unit[0], bank_labels).score(unit[1], query_labels)
    tensors = [torch.tensor(x) for x in (bank, bank_labels, queries, query_labels)]
    assert abs(knn_accuracy(*tensors, chunk=50) - expected) < 1e-9
    assert 0.5 < expected < 1


def test_few_neighbours_are_enough():
    bank, labels = torch.eye(3), torch.arange(3)
    assert knn_accuracy(bank, labels, bank, labels) == 1.0


def test_magnitude_does_not_matter():
    (bank, labels), (queries, wanted) = ([torch.tensor(x) for x in _blobs(n, n)] for n in (200, 100))
    scaled = bank * torch.rand(200, 1) * 9 + bank * 1e-3
    assert knn_accuracy(bank, labels, queries, wanted) == knn_accuracy(scaled, labels, queries, wanted)
