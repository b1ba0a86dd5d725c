"""Weighted k-NN is scikit-learn's with the same votes."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from fasttrain.evaluate.knn import knn, knn_accuracy

from .blobs import blobs


def _votes(distances):  # the squared distance of unit vectors is 2 - 2 cos
    return np.exp((1 - distances**2 / 2) / 0.07)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_knn_matches_scikit_learn_for_every_k(chunk):
    """Top-5 counts the five largest of scikit-learn's probabilities, if there are votes for them."""
    (bank, labels), (queries, expected) = blobs(400, 1, classes=8, spread=1.5), blobs(157, 2, classes=8, spread=1.5)
    scaled = bank * torch.rand(400, 1, generator=torch.Generator().manual_seed(0)).add(1e-3)  # norms do not matter
    accuracies = knn(scaled, labels, queries, expected, ks=[200, 10, 20], chunk=chunk)
    assert set(accuracies) == {10, 20, 200}
    unit = [x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (bank, queries)]
    for k, accuracy in accuracies.items():
        reference = KNeighborsClassifier(k, weights=_votes, algorithm="brute").fit(unit[0], labels.numpy())
        assert accuracy.top1 == pytest.approx(reference.score(unit[1], expected.numpy()), abs=1e-9)
        shares = reference.predict_proba(unit[1])
        five = np.where(np.sort(shares, axis=1)[:, -5:] > 0, np.argsort(shares, axis=1)[:, -5:], -1)
        assert accuracy.top5 == pytest.approx((five == expected.numpy()[:, None]).any(1).mean(), abs=1e-9)
        balanced = balanced_accuracy_score(expected.numpy(), reference.predict(unit[1]))
        assert accuracy.balanced == pytest.approx(balanced, abs=1e-9)
        assert 0.3 < accuracy.top1 < accuracy.top5 < 1
    assert knn_accuracy(bank, labels, queries, expected) == accuracies[20].top1


def test_knn_with_k_above_the_bank_uses_all_rows():
    (bank, labels), (queries, expected) = blobs(50, 1), blobs(30, 2)
    accuracies = knn(bank, labels, queries, expected, ks=[20, 50, 1000])
    assert accuracies[1000] == accuracies[50]
    assert knn_accuracy(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3)) == 1.0
