"""Features of a whole data set, without augmentation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..batches import in_step
from ..pipelines import Loader


@dataclass(frozen=True)
class Features:
    """Rows of a data set in its own order; labels where it has them."""

    features: Tensor
    labels: Tensor | None


@torch.no_grad()
def extract(backbone: nn.Module, loader: Loader, device: torch.device) -> Features:
    """Features [N, D] of every readable image of an evaluation loader, the same on every rank.

    BatchNorm is in evaluation mode.
    """
    training = backbone.training
    backbone.eval()
    rows, labels, indices = [], [], []
    try:
        for batch in in_step(loader, 0):
            rows.append(backbone(batch.views[0][0].to(device)).float())
            indices.append(batch.indices)
            if batch.labels is not None:
                labels.append(batch.labels)
    finally:
        backbone.train(training)
    order = _gather(torch.cat(indices).to(device), loader).argsort()  # unreadable images leave gaps
    features = _gather(torch.cat(rows), loader)[order]
    return Features(features, _gather(torch.cat(labels).to(device), loader)[order] if labels else None)


def _gather(rows: Tensor, loader: Loader) -> Tensor:
    """Rows of all ranks; the ranks may hold different numbers of them."""
    if loader.world_size == 1:
        return rows
    counts = torch.zeros(loader.world_size, dtype=torch.long, device=rows.device)
    counts[loader.rank] = len(rows)
    dist.all_reduce(counts)
    padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
    padded[: len(rows)] = rows
    shards = [torch.empty_like(padded) for _ in range(loader.world_size)]
    dist.all_gather(shards, padded)
    return torch.cat([shard[:count] for shard, count in zip(shards, counts.tolist(), strict=True)])
