"""Logistic regression is scikit-learn's, its penalty is chosen on training images, and few shots are few."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from fasttrain.evaluate import logistic
from fasttrain.evaluate.logistic import few_shot, fit, logistic_regression


def _blobs(count, seed, classes=5, dim=8, spread=1.0):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rows = centres[labels] + spread * generator.normal(size=(count, dim))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)


def _scikit(rows, labels, penalty):
    model = LogisticRegression(C=1 / (penalty * len(rows)), tol=1e-10, max_iter=10_000)
    return model.fit(rows.double().numpy(), labels.numpy())


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_agrees_with_scikit_learn(penalty, classes, monkeypatch):
    monkeypatch.setattr(logistic, "_ROWS", 64)  # several chunks
    rows, labels = _blobs(200, 1, classes)
    ours, theirs = fit(rows, labels, penalty, classes=classes), _scikit(rows, labels, penalty)
    scores = [torch.tensor(rows.numpy() @ w.T + b) for w, b in ((theirs.coef_, theirs.intercept_),)]
    found = rows.double() @ ours.weight.T + ours.bias
    torch.testing.assert_close(found.softmax(1), scores[0].double().softmax(1), rtol=0, atol=1e-5)
    assert ours.accuracy(rows, labels).top1 == theirs.score(rows.numpy(), labels.numpy())


def test_starting_elsewhere_ends_at_the_same_optimum():
    rows, labels = _blobs(200, 1)
    smooth = fit(rows, labels, 1.0, classes=5)
    warm, cold = (fit(rows, labels, 1e-2, classes=5, start=start) for start in (smooth, None))
    torch.testing.assert_close(warm.weight, cold.weight, rtol=0, atol=1e-5)


def test_the_whole_protocol_agrees_with_scikit_learn():
    rows, labels = _blobs(400, 1, spread=2.0)
    queries, wanted = _blobs(300, 2, spread=2.0)
    rows[:, 0] *= 1000  # standardised
    queries[:, 0] *= 1000
    found = logistic_regression(rows, labels, queries, wanted)
    scaler = StandardScaler().fit(rows.numpy())
    expected = _scikit(torch.tensor(scaler.transform(rows.numpy())), labels, found.penalty)
    score = expected.score(scaler.transform(queries.numpy()), wanted.numpy())
    assert found.top1 == pytest.approx(score, abs=1 / 300)  # a row on the boundary
    assert 0.4 < found.top1 < found.top5 == 1


def test_the_penalty_is_chosen_without_the_queries():
    rows, labels = _blobs(100, 1, spread=4.0)
    reached = [logistic_regression(rows, labels, rows, wanted).penalty for wanted in (labels, (labels + 1) % 5)]
    assert reached[0] == reached[1]


def test_a_few_shots_are_scikit_learn_s_on_the_same_draws_by_msn_s_protocol():
    # cyanure: preprocess(columns=False, centering=True) on samples, then sum of losses + 0.00025 / 2 ||w||^2, no bias
    (rows, labels), (queries, wanted) = (
        (3 + x, y) for x, y in (_blobs(200, 1, spread=1.5), _blobs(100, 2, spread=1.5))
    )
    found = few_shot(rows, labels, queries, wanted, fraction=0.1, draws=3)
    scores = []
    for draw in range(3):
        chosen = logistic.class_balanced(labels, 0.1, draw)
        few, asked = (x.numpy() - x.numpy().mean(1, keepdims=True) for x in (rows[chosen], queries))
        few, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (few, asked))
        model = LogisticRegression(C=1 / 2.5e-4, fit_intercept=False, tol=1e-10, max_iter=100_000)
        scores.append(model.fit(few.astype(np.float64), labels[chosen].numpy()).score(asked, wanted.numpy()))
    assert found.images == 20
    assert found.mean == pytest.approx(np.mean(scores), abs=1e-9)
    assert found.std == pytest.approx(np.std(scores), abs=1e-9)
    assert found.std > 0


def test_one_percent_is_at_least_one_image_a_class():
    rows, labels = _blobs(60, 1)
    assert few_shot(rows, labels, rows, labels, fraction=0.01, draws=2).images == 5
