"""Features of a whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.lockstep import in_step
from ..pipelines import Loader


@dataclass(frozen=True)
class Features:
    """Features of images in the order of the data set, and their labels, if any."""

    features: Tensor
    labels: Tensor | None


def extract(
    backbone: nn.Module,
    loader: Loader,
    device: torch.device,
    *,
    most: float = math.inf,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Return the features [N, D] of every readable image of an evaluation loader, the same on every rank.

    BatchNorm is in evaluation mode. Features of more than ``most`` bytes are stored in the host's memory. ``progress``
    is called after every batch, on every rank, with the number of images that all ranks have had.
    """
    rows = extract_views(backbone, loader, device, most=most, progress=progress)
    return Features(rows.features[:, 0], rows.labels)


@torch.no_grad()
def extract_views(
    backbone: nn.Module,
    loader: Loader,
    device: torch.device,
    *,
    most: float = math.inf,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Return what :func:`extract` does for all V views of the loader's first resolution: [N, V, D]."""
    training = backbone.training
    backbone.eval()
    count = len(loader.source)
    seen, features = torch.zeros(count, dtype=torch.bool), None
    try:
        for step, batch in enumerate(in_step(loader, 0), start=1):
            views = batch.views[0].to(device)
            with _exact_convolutions():
                rows = backbone(views.flatten(0, 1)).float().unflatten(0, views.shape[:2]).transpose(0, 1)
            rows, indices = _gather(rows, batch.indices.to(device), loader)
            if features is None:  # allocate once: joining and sorting parts later takes three times the memory
                size = count * rows.shape[1:].numel() * rows.element_size()
                features = rows.new_empty(count, *rows.shape[1:], device="cpu" if size > most else device)
            features[indices.to(features.device)] = rows.to(features.device)
            seen[indices.cpu()] = True
            if progress is not None:
                progress(min(step * loader.batch_size * loader.world_size, count))
    finally:
        backbone.train(training)
    assert features is not None
    labels = loader.source.labels
    if not seen.all():  # unreadable images leave gaps
        features = features[seen.to(features.device)]
    return Features(features, None if labels is None else torch.from_numpy(labels)[seen].to(features.device))


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Compute fp32 convolutions in fp32. By default cuDNN uses tf32, which has 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _gather(rows: Tensor, indices: Tensor, loader: Loader) -> tuple[Tensor, Tensor]:
    """Return the rows and image numbers of all ranks. Ranks may have different numbers of rows."""
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
