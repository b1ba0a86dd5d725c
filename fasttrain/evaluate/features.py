"""Features of a whole data set, without augmentation or of several augmented views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ..batches import in_step
from ..pipelines import Loader, Source


@dataclass(frozen=True)
class Features:
    """Rows of a data set in its own order; labels where it has them."""

    features: Tensor
    labels: Tensor | None


def extract(backbone: nn.Module, loader: Loader, device: torch.device) -> Features:
    """Features [N, D] of every readable image of an evaluation loader, the same on every rank.

    BatchNorm is in evaluation mode.
    """
    found = extract_views(backbone, loader, device)
    return Features(found.features[:, 0], found.labels)


@torch.no_grad()
def extract_views(backbone: nn.Module, loader: Loader, device: torch.device) -> Features:
    """As :func:`extract`, of all V views of the loader's first resolution: [N, V, D]."""
    training = backbone.training
    backbone.eval()
    rows, labels, indices = [], [], []
    try:
        for batch in in_step(loader, 0):
            views = batch.views[0].to(device)
            with _exact_convolutions():
                features = backbone(views.flatten(0, 1)).float()
            rows.append(features.unflatten(0, views.shape[:2]).transpose(0, 1))
            indices.append(batch.indices)
            if batch.labels is not None:
                labels.append(batch.labels)
    finally:
        backbone.train(training)
    order = _gather(torch.cat(indices).to(device), loader).argsort()  # unreadable images leave gaps
    features = _gather(torch.cat(rows), loader)[order]
    return Features(features, _gather(torch.cat(labels).to(device), loader)[order] if labels else None)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """fp32 as it is written: cuDNN forms fp32 convolutions in tf32, of 10 bits, unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Subset:
    """Some images of a source, numbered anew."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self._indices = source, list(indices)
        self.name, self.channels, self.encoded = source.name, source.channels, source.encoded
        self.classes = source.classes
        self.labels: NDArray[np.int64] | None = None if source.labels is None else source.labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Bytes or pixels of image ``i``; OSError where it cannot be read."""
        return self._source.read(self._indices[i])

    def describe(self, i: int) -> str:
        """Name of image ``i`` in the whole source."""
        return self._source.describe(self._indices[i])

    def stamp(self, i: int) -> str:
        """What is another where image ``i`` may be another."""
        return self._source.stamp(self._indices[i])


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
