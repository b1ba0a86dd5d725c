"""Features of a whole data set, without augmentation or of several augmented views."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.lockstep import in_step
from ..pipelines import Loader


@dataclass(frozen=True)
class Features:
    """Rows of a data set in its own order; labels where it has them."""

    features: Tensor
    labels: Tensor | None


def extract(backbone: nn.Module, loader: Loader, device: torch.device, *, most: float = math.inf) -> Features:
    """Features [N, D] of every readable image of an evaluation loader, the same on every rank.

    BatchNorm is in evaluation mode. Features of more than ``most`` bytes are kept in the host's memory.
    """
    found = extract_views(backbone, loader, device, most=most)
    return Features(found.features[:, 0], found.labels)


@torch.no_grad()
def extract_views(backbone: nn.Module, loader: Loader, device: torch.device, *, most: float = math.inf) -> Features:
    """As :func:`extract`, of all V views of the loader's first resolution: [N, V, D]."""
    training = backbone.training
    backbone.eval()
    count = len(loader.source)
    seen, features = torch.zeros(count, dtype=torch.bool), None
    try:
        for batch in in_step(loader, 0):
            views = batch.views[0].to(device)
            with _exact_convolutions():
                rows = backbone(views.flatten(0, 1)).float().unflatten(0, views.shape[:2]).transpose(0, 1)
            rows, indices = _gather(rows, batch.indices.to(device), loader)
            if features is None:  # whole at once: pieces that are joined and sorted later take three times as much
                size = count * rows.shape[1:].numel() * rows.element_size()
                features = rows.new_empty(count, *rows.shape[1:], device="cpu" if size > most else device)
            features[indices.to(features.device)] = rows.to(features.device)
            seen[indices.cpu()] = True
    finally:
        backbone.train(training)
    assert features is not None
    labels = loader.source.labels
    if not seen.all():  # unreadable images leave gaps
        features = features[seen.to(features.device)]
    return Features(features, None if labels is None else torch.from_numpy(labels)[seen].to(features.device))


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """fp32 as it is written: cuDNN forms fp32 convolutions in tf32, of 10 bits, unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _gather(rows: Tensor, indices: Tensor, loader: Loader) -> tuple[Tensor, Tensor]:
    """A batch's rows of all ranks, and the images' numbers; the ranks may hold different numbers of them."""
    if loader.world_size == 1:
        return rows, indices
    padded = rows.new_zeros(loader.batch_size, *rows.shape[1:])
    padded[: len(rows)] = rows
    numbers = indices.new_full((loader.batch_size,), -1)
    numbers[: len(indices)] = indices
    every_row = [torch.empty_like(padded) for _ in range(loader.world_size)]
    every_number = [torch.empty_like(numbers) for _ in range(loader.world_size)]
    dist.all_gather(every_row, padded)
    dist.all_gather(every_number, numbers)
    numbers = torch.cat(every_number)
    return torch.cat(every_row)[numbers >= 0], numbers[numbers >= 0]
