"""Use lightly's views in our trainer: a Loader with the same images in the same order and lightly's transform."""

from __future__ import annotations

import io
from collections.abc import Generator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fasttrain.pipelines import Batch, Loader, Source

from .peer import transform


class LightlySimCLR(Loader):
    """The Loader for SimCLR, with views of ``SimCLRTransform`` in torch's DataLoader with ``threads`` workers.

    Batches have the Loader's indices, types and layout. Each worker draws from (seed, epoch), so an epoch repeats from
    its first step on with the same number of workers.
    """

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """Return the batches from ``start_step`` on, with lightly's views."""
        steps = self._plan(epoch, start_step * self.batch_size * self.world_size)
        batches = DataLoader(
            _Views(self.source, transform("simclr", self.recipe)),
            batch_sampler=[step.tolist() for step in steps],
            num_workers=self.threads,
            generator=torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63),
        )
        for views, indices in batches:
            labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[indices.numpy()])
            yield Batch((_as_ours(views),), labels, indices)


class _Views(Dataset[Any]):
    """Views of an image, and its index."""

    def __init__(self, source: Source, cut: Any) -> None:
        self.source, self.cut = source, cut

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[list[Tensor], int]:
        with Image.open(io.BytesIO(self.source.read(i).tobytes())) as image:
            return self.cut(image.convert("RGB")), i


def _as_ours(views: list[Tensor]) -> Tensor:
    """Return views [V, B, C, H, W], channels-last in memory, so that both sides run the same kernels."""
    flat = torch.cat(views).contiguous(memory_format=torch.channels_last)
    return flat.unflatten(0, (len(views), len(views[0])))
