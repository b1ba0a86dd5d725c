"""The evaluation during a training: k-NN and the spectrum of a backbone's features on clean images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.resolve import Config
from ..distributed.world import World
from ..pipelines import Loader, Size, Source, Splits, Subset, ViewRecipe, evaluation_view, sides
from .draws import spaced
from .features import Features, extract
from .knn import knn_accuracy
from .spectrum import SPECTRUM_ROWS, rankme, spectrum_stride

_PIXEL_SIDE = 32  # largest size of the images whose raw pixels are compared
_PIXEL_BYTES = 2**31  # raw pixels of larger training sets are not compared
_COMPARED_ROWS = 2_000
_DEVICE_SHARE = 1 / 8  # of a GPU's memory for features, next to the training

ShowProgress = Callable[[str, int, int], None]
"""Receives a name of the work, and the images done and in all. It may raise, on all ranks, to end the work."""


def _show_nothing(name: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Evaluation:
    """k-NN and spectrum of a backbone. k-NN is None without labels or without held-out images."""

    knn_top1: float | None
    rankme: float
    finite: bool
    """Whether all features are finite. If not, the other values are unknown."""
    rows: Tensor
    """Features of at most 2,000 evenly spaced training images, to compare with another step's."""


class Evaluator:
    """Evaluate backbones on the clean images of both splits. Nothing is fitted on the held-out split.

    At most ``knn_train_images`` and ``knn_val_images`` evenly spaced images are used, so that the cost is bounded.
    """

    def __init__(self, splits: Splits, config: Config, device: torch.device, world: World) -> None:
        self.device = device
        recipe, size = config.views, config.views.views[0].size
        options: dict[str, Any] = {
            "rank": world.rank,
            "world_size": world.size,
            "device": device.type,
            "threads": config.train.num_workers or world.threads,
            "shuffle": False,
            "drop_last": False,
            "max_bad_fraction": config.train.max_bad_fraction,
        }
        t = config.train
        self._train, self._val, self._options = spaced(splits.train, t.knn_train_images), None, options
        if splits.val is not None and not splits.missing_for_knn:
            self._val = spaced(splits.val, t.knn_val_images)
        else:  # only the spectrum needs images, and it needs these
            self._train = Subset(self._train, range(0, len(self._train), spectrum_stride(len(self._train))))
        self._batch = t.batch_size_per_gpu
        self._pixel_views = evaluation_view(recipe, _reduced(size))
        views = evaluation_view(recipe, size)
        self._loaders = [self._loader(source, views) for source in (self._train, self._val) if source is not None]
        self._bad_pixels: dict[str, str] = {}
        self._most = math.inf
        if device.type == "cuda":
            self._most = torch.cuda.get_device_properties(device).total_memory * _DEVICE_SHARE

    @property
    def images(self) -> tuple[int, int]:
        """The numbers of training images and held-out images that are used; no held-out ones without k-NN."""
        return len(self._train), 0 if self._val is None else len(self._val)

    def backbone(self, backbone: nn.Module, progress: ShowProgress = _show_nothing, name: str = "k-NN") -> Evaluation:
        """Evaluate a network. ``progress`` gets ``name`` with the number of images done."""
        features = self._extract(backbone, self._loaders, progress, name)
        bank = features[0].features
        rows = bank[:: math.ceil(len(bank) / _COMPARED_ROWS)].clone()
        if not all(part.isfinite().all() for part in torch.split(bank, SPECTRUM_ROWS)):
            return Evaluation(None, math.nan, finite=False, rows=rows)
        spectrum = rankme(bank[:: spectrum_stride(len(bank))]) if bank.shape[1] <= 8192 else math.nan
        return Evaluation(_knn(features), spectrum, finite=True, rows=rows)

    def pixels(self, progress: ShowProgress = _show_nothing) -> float | None:
        """Return the k-NN accuracy of the normalised pixels themselves, of images at most 32 pixels wide.

        Return None without k-NN, or if the training images' pixels take more than 2 GiB.
        """
        view = self._pixel_views.views[0]
        if (
            self._val is None
            or len(self._train) * math.prod(sides(view.size)) * self._pixel_views.channels * 4 > _PIXEL_BYTES
        ):
            return None
        loaders = [self._loader(source, self._pixel_views) for source in (self._train, self._val)]
        try:
            return _knn(self._extract(nn.Flatten(), loaders, progress, "k-NN of raw pixels"))
        finally:
            for loader in loaders:
                self._bad_pixels |= loader.bad
                loader.close()

    def _loader(self, source: Source, views: ViewRecipe) -> Loader:
        return Loader(source, views, self._batch, **self._options)

    def _extract(self, backbone: nn.Module, loaders: list[Loader], progress: ShowProgress, name: str) -> list[Features]:
        bank, total = len(self._train), sum(self.images)

        def after(before: int) -> Callable[[int], None]:
            return lambda done: progress(name, before + done, total)

        return [
            extract(backbone, loader, self.device, most=self._most, progress=after(before))
            for loader, before in zip(loaders, (0, bank), strict=False)
        ]

    @property
    def bad(self) -> dict[str, str]:
        """Images that could not be read, with the reason."""
        return self._bad_pixels | {name: why for loader in self._loaders for name, why in loader.bad.items()}

    def close(self) -> None:
        """Free the loaders."""
        for loader in self._loaders:
            loader.close()


def _reduced(size: Size) -> Size:
    """Return a size of the same shape whose longer side has at most 32 pixels."""
    height, width = sides(size)
    scale = min(1, _PIXEL_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _knn(features: list[Features]) -> float | None:
    """Return the accuracy of held-out features (second) by training features (first), or None without the second."""
    if len(features) == 1:
        return None
    bank, queries = features
    assert bank.labels is not None
    assert queries.labels is not None
    return knn_accuracy(bank.features, bank.labels, queries.features, queries.labels)
