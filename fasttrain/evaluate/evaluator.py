"""Evaluates a backbone on the clean images of a data set: k-nearest neighbours and the spectrum of its features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..distributed import World
from ..pipelines import Loader, Splits, evaluation_view
from .features import extract
from .knn import knn_accuracy
from .spectrum import rankme

_RANKME_ROWS = 25_600  # as in the paper: enough rows for the spectrum of any backbone here
_PIXEL_SIDE = 32  # raw pixels are compared at this size at most


@dataclass(frozen=True)
class Evaluation:
    """k-NN and spectrum of a backbone; k-NN is None without labels or without held-out images."""

    knn_top1: float | None
    rankme: float
    finite: bool
    """Whether all features are numbers; if not, nothing else is known."""


class Evaluator:
    """Evaluates backbones on the clean images of both splits. Nothing is fitted on the held-out one."""

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
        batch = config.train.batch_size_per_gpu
        views = evaluation_view(recipe, size)
        pixels = evaluation_view(recipe, min(size, _PIXEL_SIDE))
        sources = [splits.train] if splits.val is None else [splits.train, splits.val]
        self._loaders = [Loader(source, views, batch, **options) for source in sources]
        self._pixel_loaders = [Loader(source, pixels, batch, **options) for source in sources]

    def backbone(self, backbone: nn.Module) -> Evaluation:
        """The features of a network."""
        return self._evaluate(backbone, self._loaders)

    def pixels(self) -> float | None:
        """k-NN on the normalised pixels themselves, at most 32 pixels wide."""
        return self._evaluate(nn.Flatten(), self._pixel_loaders).knn_top1

    def _evaluate(self, backbone: nn.Module, loaders: list[Loader]) -> Evaluation:
        found = [extract(backbone, loader, self.device) for loader in loaders]
        bank = found[0]
        if not bank.features.isfinite().all():
            return Evaluation(None, math.nan, finite=False)
        stride = math.ceil(len(bank.features) / _RANKME_ROWS)
        spectrum = rankme(bank.features[::stride]) if bank.features.shape[1] <= 8192 else math.nan
        if len(found) == 1 or bank.labels is None or found[1].labels is None:
            return Evaluation(None, spectrum, finite=True)
        top1 = knn_accuracy(bank.features, bank.labels, found[1].features, found[1].labels)
        return Evaluation(top1, spectrum, finite=True)

    @property
    def bad(self) -> dict[str, str]:
        """Images that could not be read, and why."""
        return {name: why for loader in (*self._loaders, *self._pixel_loaders) for name, why in loader.bad.items()}

    def close(self) -> None:
        """Free the loaders."""
        for loader in (*self._loaders, *self._pixel_loaders):
            loader.close()
