import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fasttrain.evaluate.knn import knn, knn_accuracy


def _blobs(count, seed, classes=5):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    centres = np.random.default_rng(0).normal(size=(classes, 8))
    return centres[labels] + generator.normal(size=(count, 8)), labels


def _votes(distances):  # squared distance of unit vectors is 2 - 2 cos
    return np.exp((1 - distances**2 / 2) / 0.07)


def test_agrees_with_scikit_learn_on_the_same_votes():
    (bank, bank_labels), (queries, query_labels) = _blobs(400, 1), _blobs(157, 2)
    reference = KNeighborsClassifier(20, weights=_votes, algorithm="brute")
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


@pytest.mark.parametrize("chunk", [7, 1024])
def test_all_k_from_one_search_agree_with_scikit_learn(chunk):
    """Top-1 is its score; top-5 is in the five largest of its probabilities, if there are votes for it."""
    (bank, bank_labels), (queries, query_labels) = _blobs(400, 1, classes=8), _blobs(157, 2, classes=8)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    found = knn(*[torch.tensor(x) for x in (bank, bank_labels, queries, query_labels)], ks=[200, 10, 20], chunk=chunk)
    assert set(found) == {10, 20, 200}
    for k, accuracy in found.items():
        reference = KNeighborsClassifier(k, weights=_votes, algorithm="brute").fit(unit[0], bank_labels)
        assert accuracy.top1 == pytest.approx(reference.score(unit[1], query_labels), abs=1e-9)
        shares = reference.predict_proba(unit[1])
        five = np.where(np.sort(shares, axis=1)[:, -5:] > 0, np.argsort(shares, axis=1)[:, -5:], -1)
        assert accuracy.top5 == pytest.approx((five == query_labels[:, None]).any(1).mean(), abs=1e-9)
        assert accuracy.top1 < accuracy.top5 < 1


def test_a_k_beyond_the_bank_is_all_of_it():
    (bank, labels), (queries, wanted) = ([torch.tensor(x) for x in _blobs(n, n)] for n in (50, 30))
    found = knn(bank, labels, queries, wanted, ks=[20, 50, 1000])
    assert found[1000] == found[50]
    assert found[20].top1 == knn_accuracy(bank, labels, queries, wanted, k=20)
