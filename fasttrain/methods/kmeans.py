"""Spherical k-means over the rows of all ranks, for DeepCluster v2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from ..kernels.collectives import Group

_SCORES = 1 << 24  # at most so many scores at a time


def spherical_kmeans(
    rows: Tensor, clusters: int, *, iterations: int = 10, group: Group | None = None
) -> tuple[Tensor, Tensor]:
    """Centroids [K, D] of unit norm, and the cluster of each row [N] int64, of unit-norm rows [N, D].

    As in DeepCluster v2's official code it starts from K rows, drawn by torch's generator, and alternates: every row
    goes to the centroid of largest cosine, every centroid becomes the normalised mean of its rows, and one without rows
    stays where it is. All ranks hold all rows and the same generator; each assigns its part. Raises ValueError for
    fewer rows than clusters.
    """
    if len(rows) < clusters:
        raise ValueError(f"k-means cannot make {clusters} clusters of {len(rows)} rows; use fewer")
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    bounds = [len(rows) * r // size for r in range(size + 1)]
    mine = rows[bounds[rank] : bounds[rank + 1]]
    centroids = rows[torch.randperm(len(rows))[:clusters].to(rows.device)]
    for _ in range(iterations):
        nearest = _nearest(mine, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, mine)
        counts = torch.bincount(nearest, minlength=clusters)
        if group is not None:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(counts, group=group)
        centroids = torch.where(counts[:, None] > 0, normalize(sums, dim=1), centroids)
    nearest = _nearest(mine, centroids)
    if group is None:
        return centroids, nearest
    # Parts are of different lengths where the ranks do not divide the rows, which gloo does not gather.
    everyone = nearest.new_zeros(len(rows))
    everyone[bounds[rank] : bounds[rank + 1]] = nearest
    dist.all_reduce(everyone, group=group)
    return centroids, everyone


def _nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """Number of the centroid of largest cosine [N], the scores in blocks."""
    block = max(_SCORES // len(centroids), 1)
    return torch.cat([(part @ centroids.T).argmax(1) for part in torch.split(rows, block)])
