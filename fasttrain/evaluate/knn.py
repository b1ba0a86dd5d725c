"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, as in facebookresearch/dino)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .nearest import nearest


@dataclass(frozen=True)
class Accuracy:
    """Fractions in [0, 1] of the queries whose class ranks first, and among the first five."""

    top1: float
    top5: float
    balanced: float
    """Mean over the queries' classes of each class's ``top1``. It equals ``top1`` if all classes are equally large."""


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 256,
) -> float:
    """Return the top-1 accuracy of ``queries`` [M, D] with the labelled ``bank`` [N, D]; see :func:`knn`."""
    accuracies = knn(bank, bank_labels, queries, query_labels, ks=[k], temperature=temperature, chunk=chunk)
    return accuracies[k].top1


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 200),
    temperature: float = 0.07,
    chunk: int = 256,
) -> dict[int, Accuracy]:
    """Return the accuracy of ``queries`` [M, D] with the labelled ``bank`` [N, D] for each k, from one exact search.

    Each of the k neighbours with the highest cosine votes for its class with weight exp(cosine / temperature). A k
    above N means N. At most chunk x N similarities exist at a time, on the queries' device.
    """
    bank_labels, query_labels = bank_labels.to(queries.device), query_labels.to(queries.device)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    cosines, neighbours = nearest(bank, queries, max(ks), chunk=chunk)
    hits: dict[int, list[tuple[Tensor, Tensor]]] = {k: [] for k in ks}
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        weights, labels = ((cosines[rows] - 1) / temperature).exp(), query_labels[rows]
        voted, counted = bank_labels[neighbours[rows]], 0
        votes = torch.zeros(len(labels), classes, device=queries.device)
        for k in sorted(ks):
            votes.scatter_add_(1, voted[:, counted:k], weights[:, counted:k])
            counted = k
            hits[k].append(hits_of(votes, labels, above=0.0))
    return {k: accuracy_of(parts, query_labels) for k, parts in hits.items()}


def accuracy_of(hits: Sequence[tuple[Tensor, Tensor]], labels: Tensor) -> Accuracy:
    """Return the accuracy on labels [M] from the results of :func:`hits_of`, in order, on parts of the rows."""
    first, five = (torch.cat(part).double() for part in zip(*hits, strict=True))
    sizes = labels.bincount()
    per_class = labels.bincount(weights=first)[sizes > 0] / sizes[sizes > 0]
    return Accuracy(float(first.mean()), float(five.mean()), float(per_class.mean()))


def hits_of(scores: Tensor, labels: Tensor, above: float = -math.inf) -> tuple[Tensor, Tensor]:
    """Return which rows of ``scores`` [M, C] give their label [M] the highest score, and one of the top five: [M], [M].

    A label whose score is not above ``above``, such as a label without votes, is not a top-five hit.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    hits = (best.indices == labels[:, None]) & (best.values > above)
    return scores.argmax(1) == labels, hits.any(1)
