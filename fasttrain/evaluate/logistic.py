"""Logistic regression on frozen features: the fast linear evaluation, and few-shot evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import class_balanced, held_out
from .knn import Accuracy, accuracy_of, hits_of

_ROWS = 65_536  # rows converted to fp64 at once
_PENALTIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_MSN_PENALTY = 2.5e-4


@dataclass(frozen=True)
class Classifier:
    """A linear classifier with scores ``rows @ weight.T + bias``, weight [C, D]."""

    weight: Tensor
    bias: Tensor

    def accuracy(self, rows: Tensor, labels: Tensor) -> Accuracy:
        """Return the accuracy on rows [M, D]."""
        hits = [hits_of(x.to(self.weight) @ self.weight.T + self.bias, y) for x, y in _chunks(rows, labels)]
        return accuracy_of(hits, labels)


@dataclass(frozen=True)
class Regression:
    """Accuracy of logistic regression on the held-out images, and the penalty that was chosen without them."""

    top1: float
    top5: float
    balanced: float
    penalty: float


@dataclass(frozen=True)
class FewShot:
    """Mean and standard deviation of top-1 accuracy, and mean balanced accuracy, over draws of labels."""

    fraction: float
    images: int
    draws: int
    mean: float
    std: float
    balanced: float


def fit(
    rows: Tensor,
    labels: Tensor,
    penalty: float,
    *,
    classes: int,
    bias: bool = True,
    start: Classifier | None = None,
) -> Classifier:
    """Minimise mean cross-entropy + penalty / 2 ||weight||^2 over rows [N, D], in fp64, by L-BFGS to convergence.

    The bias has no penalty; it is 0 with ``bias=False``. This is scikit-learn's LogisticRegression with
    C = 1 / (penalty N).
    """
    dim = rows.shape[1]
    theta = torch.zeros(classes, dim + 1, dtype=torch.float64, device=rows.device)
    if start is not None:
        theta.copy_(torch.cat([start.weight, start.bias[:, None]], 1))
    theta.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        """Return the loss and set ``theta.grad``, one chunk of rows at a time."""
        weight, offset = theta.detach()[:, :dim], theta.detach()[:, dim]
        loss: Tensor = penalty / 2 * weight.square().sum()
        gradient = torch.cat([penalty * weight, torch.zeros_like(offset)[:, None]], 1)
        for x, y in _chunks(rows, labels):
            x = x.double()
            logs = F.log_softmax(x @ weight.T + offset, dim=1)
            loss = loss - logs.gather(1, y[:, None]).sum() / len(rows)
            error = (logs.exp() - F.one_hot(y, classes)) / len(rows)
            gradient[:, :dim] += error.T @ x
            if bias:
                gradient[:, dim] += error.sum(0)
        theta.grad = gradient
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    solution = theta.detach()
    return Classifier(solution[:, :dim], solution[:, dim])


def logistic_regression(
    rows: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    penalties: Sequence[float] = _PENALTIES,
    seed: int = 0,
) -> Regression:
    """Fit L2-regularised logistic regression on features, standardised per dimension by the training rows [N, D].

    The penalty of :func:`fit` is chosen on a tenth of the training images, after a fit on the others. The final fit
    uses all of them. The queries [M, D] are used once, at the end.
    """
    mean, std = rows.mean(0), rows.std(0).clamp_min(1e-6)
    rows, queries = (rows - mean) / std, (queries - mean) / std
    classes = int(torch.cat([labels, query_labels]).max()) + 1
    fitted, tuning = held_out(labels, seed=seed)
    top1: dict[float, float] = {}
    classifier = None
    for penalty in sorted(penalties, reverse=True):  # each fit starts at the solution of the larger penalty
        classifier = fit(rows[fitted], labels[fitted], penalty, classes=classes, start=classifier)
        top1[penalty] = classifier.accuracy(rows[tuning], labels[tuning]).top1
    best = max(top1, key=lambda penalty: (top1[penalty], penalty))
    accuracy = fit(rows, labels, best, classes=classes).accuracy(queries, query_labels)
    return Regression(accuracy.top1, accuracy.top5, accuracy.balanced, best)


def few_shot(
    rows: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    fraction: float,
    draws: int = 5,
    penalty: float = _MSN_PENALTY,
    seed: int = 0,
) -> FewShot:
    """Fit logistic regression on a fraction of every class's labels, at least one, for several draws.

    This is MSN's low-shot evaluation (arXiv 2204.07141, ``logistic_eval.py``, in cyanure's terms). Every row is centred
    by its own mean and has unit norm. There is no bias. ``penalty`` is fixed, because too few labels remain to choose
    it, and refers to the summed cross-entropy. Cyanure stops at a duality gap of 1e-3; this converges.
    """
    classes = int(torch.cat([labels, query_labels]).max()) + 1
    accuracies = []
    for draw in range(draws):
        chosen = class_balanced(labels, fraction, seed + draw)
        few, centred = (F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in (rows[chosen], queries))
        classifier = fit(few, labels[chosen], penalty / len(few), classes=classes, bias=False)
        accuracies.append(classifier.accuracy(centred, query_labels))
    top1 = torch.tensor([accuracy.top1 for accuracy in accuracies], dtype=torch.float64)
    balanced = sum(accuracy.balanced for accuracy in accuracies) / draws
    return FewShot(fraction, len(chosen), draws, float(top1.mean()), float(top1.std(correction=0)), balanced)


def _chunks(rows: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(rows, _ROWS), torch.split(labels, _ROWS), strict=True))
