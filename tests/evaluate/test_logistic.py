"""Logistic regression and few-shot evaluation match scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fasttrain.evaluate import logistic
from fasttrain.evaluate.logistic import few_shot, fit, logistic_regression

from .blobs import blobs


def _scikit(rows, labels, penalty):
    model = LogisticRegression(C=1 / (penalty * len(rows)), tol=1e-10, max_iter=10_000)
    return model.fit(rows.double().numpy(), labels.numpy())


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_fit_matches_scikit_learn(penalty, classes, monkeypatch):
    monkeypatch.setattr(logistic, "_ROWS", 64)  # several chunks
    rows, labels = blobs(200, 1, classes)
    ours, theirs = fit(rows, labels, penalty, classes=classes), _scikit(rows, labels, penalty)
    expected = torch.tensor(rows.numpy() @ theirs.coef_.T + theirs.intercept_).double()
    scores = rows.double() @ ours.weight.T + ours.bias
    torch.testing.assert_close(scores.softmax(1), expected.softmax(1), rtol=0, atol=1e-5)
    assert ours.accuracy(rows, labels).top1 == theirs.score(rows.numpy(), labels.numpy())


def test_fit_does_not_depend_on_the_start():
    rows, labels = blobs(200, 1)
    smooth = fit(rows, labels, 1.0, classes=5)
    warm, cold = (fit(rows, labels, 1e-2, classes=5, start=start) for start in (smooth, None))
    torch.testing.assert_close(warm.weight, cold.weight, rtol=0, atol=1e-5)


def test_regression_matches_scikit_learn_on_standardised_rows():
    (rows, labels), (queries, expected) = blobs(400, 1, spread=2.0), blobs(300, 2, spread=2.0)
    rows[:, 0] *= 1000
    queries[:, 0] *= 1000
    result = logistic_regression(rows, labels, queries, expected)
    scaler = StandardScaler().fit(rows.numpy())
    theirs = _scikit(torch.tensor(scaler.transform(rows.numpy())), labels, result.penalty)
    score = theirs.score(scaler.transform(queries.numpy()), expected.numpy())
    assert result.top1 == pytest.approx(score, abs=1 / 300)  # one row on the boundary
    assert 0.4 < result.top1 < result.top5 == 1


def test_regression_chooses_the_penalty_without_the_queries():
    rows, labels = blobs(100, 1, spread=4.0)
    first, second = (logistic_regression(rows, labels, rows, y).penalty for y in (labels, (labels + 1) % 5))
    assert first == second


def test_few_shot_matches_scikit_learn_by_msn_s_protocol():
    """cyanure: preprocess(columns=False, centering=True), then sum of losses + 0.00025 / 2 ||w||^2, without a bias."""
    (rows, labels), (queries, expected) = blobs(200, 1, spread=1.5), blobs(100, 2, spread=1.5)
    rows, queries = rows + 3, queries + 3
    result = few_shot(rows, labels, queries, expected, fraction=0.1, draws=3)
    scores = []
    for draw in range(3):
        chosen = logistic.class_balanced(labels, 0.1, draw)
        few, centred = (x.numpy() - x.numpy().mean(1, keepdims=True) for x in (rows[chosen], queries))
        few, centred = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (few, centred))
        model = LogisticRegression(C=1 / 2.5e-4, fit_intercept=False, tol=1e-10, max_iter=100_000)
        scores.append(model.fit(few.astype(np.float64), labels[chosen].numpy()).score(centred, expected.numpy()))
    assert (result.images, result.mean) == (20, pytest.approx(np.mean(scores), abs=1e-9))
    assert 0 < result.std == pytest.approx(np.std(scores), abs=1e-9)
    assert few_shot(rows, labels, rows, labels, fraction=0.001, draws=2).images == 5  # one per class
