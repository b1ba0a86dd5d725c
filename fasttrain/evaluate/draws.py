"""Subsets of images: evenly spaced ones, and random ones with a fraction of every class."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pipelines import Source, Subset


def spaced(source: Source, count: int) -> Source:
    """Return ``count`` evenly spaced images of a source, so that all classes are included, or the source itself."""
    if count >= len(source):
        return source
    return Subset(source, [k * len(source) // count for k in range(count)])


def class_balanced(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Return the rows [n], in order, of a random ``fraction`` of each class of ``labels`` [N], at least one each."""
    generator = torch.Generator().manual_seed(seed)
    host, chosen = labels.cpu(), []
    for label in torch.unique(host):
        rows = (host == label).nonzero()[:, 0]
        count = max(1, round(fraction * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen).sort().values.to(labels.device)


def held_out(labels: Tensor, fraction: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the rows of ``labels`` [N] to fit on, and a ``fraction`` of every class to choose settings by.

    A class of one row is in the first part. If every class has one row, both parts are all rows.
    """
    rows = class_balanced(labels, fraction, seed)
    single = labels.bincount()[labels] == 1
    rows = rows[~single[rows]]
    if not len(rows):
        everything = torch.arange(len(labels), device=labels.device)
        return everything, everything
    fitted = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    fitted[rows] = False
    return fitted.nonzero()[:, 0], rows
