"""Spherical k-means over the rows of all ranks, for DeepCluster v2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from ..kernels.collectives import Group

SCORES = 1 << 24
"""The largest number of scores held at a time."""


def spherical_kmeans(
    rows: Tensor, clusters: int, *, iterations: int = 10, group: Group | None = None
) -> tuple[Tensor, Tensor]:
    """Return unit-norm centroids [K, D], and the cluster of each row [N] int64, of unit-norm rows [N, D].

    As in DeepCluster v2's official code, it starts from K rows drawn by torch's generator and alternates two steps.
    Every row goes to the centroid with the largest cosine. Every centroid becomes the normalised mean of its rows; a
    centroid without rows does not move.

    All ranks hold all rows and the same generator state; each rank assigns its part of the rows. Raise ValueError for
    fewer rows than clusters.
    """
    if len(rows) < clusters:
        raise ValueError(
            f"k-means needs at least {clusters} rows for {clusters} clusters, got {len(rows)}. Use fewer clusters."
        )
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    bounds = [len(rows) * r // size for r in range(size + 1)]
    own = rows[bounds[rank] : bounds[rank + 1]]
    centroids = rows[torch.randperm(len(rows))[:clusters].to(rows.device)]
    for _ in range(iterations):
        nearest = _nearest(own, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, own)
        counts = torch.bincount(nearest, minlength=clusters)
        if group is not None:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(counts, group=group)
        centroids = torch.where(counts[:, None] > 0, normalize(sums, dim=1), centroids)
    nearest = _nearest(own, centroids)
    if group is None:
        return centroids, nearest
    # gloo cannot gather parts of different lengths, which occur if the ranks do not divide the rows.
    labels = nearest.new_zeros(len(rows))
    labels[bounds[rank] : bounds[rank + 1]] = nearest
    dist.all_reduce(labels, group=group)
    return centroids, labels


def _nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """Return the number [N] of the centroid with the largest cosine, in blocks of rows."""
    block = max(SCORES // len(centroids), 1)
    return torch.cat([(part @ centroids.T).argmax(1) for part in torch.split(rows, block)])
