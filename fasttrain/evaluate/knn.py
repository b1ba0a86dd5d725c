"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018, as in facebookresearch/dino)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """Top-1 accuracy in [0, 1] of ``queries`` [M, D] against the labelled ``bank`` [N, D].

    Each of the k neighbours of highest cosine votes for its class with weight exp(cosine / temperature). Exact, in
    chunks of queries, so that at most chunk x N similarities exist. k is cut to N.
    """
    bank = F.normalize(bank.float(), dim=1)
    classes = int(torch.cat([bank_labels, query_labels]).max()) + 1
    correct = 0
    for start in range(0, len(queries), chunk):
        rows, labels = queries[start : start + chunk].float(), query_labels[start : start + chunk]
        cosines, neighbours = (F.normalize(rows, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(rows), classes, device=rows.device)
        votes.scatter_add_(1, bank_labels[neighbours], ((cosines - 1) / temperature).exp())
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(queries)
