"""The images that a report shows, and their features by a run's network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..config.settings import IN_MEMORY
from ..errors import ConfigError
from ..evaluate.features import extract
from ..pipelines import DataError, Loader, Splits, Subset, ViewRecipe, evaluation_view, open_source
from ..pretrained import Backbone, from_run
from .pictures import in_rgb, to_image
from .runs import Run

_BATCH = 64


@dataclass(frozen=True)
class Sample:
    """Some images of a run's data, and their features."""

    backbone: Backbone
    source: Subset
    """The images that could be read."""
    rows: Tensor
    """Features [N, D] of unit norm, on the CPU."""
    held_out: bool
    """Whether the images were held out from the training."""

    @property
    def labels(self) -> list[int] | None:
        """Class numbers, or None."""
        return None if self.source.labels is None else [int(label) for label in self.source.labels]

    def describe(self, i: int) -> str:
        """Return the name of image ``i``, with its class if it has one."""
        labels, name = self.labels, short(self.source.describe(i))
        return name if labels is None else f"{name}, class {self.class_of(labels[i])}"

    def class_of(self, label: int) -> str:
        """Return the name of a class, or its number."""
        return class_name(self.source.classes, label)

    def pictures(self, indices: Sequence[int]) -> list[Image.Image]:
        """Return the network's inputs for images ``indices`` before normalisation, in RGB."""
        blueprint = self.backbone.blueprint
        views = self.views(indices, evaluation_view(in_rgb(blueprint.recipe), blueprint.size))
        return [to_image(view.numpy()) for view in views]

    def inputs(self, indices: Sequence[int]) -> Tensor:
        """Return the network's inputs for images ``indices``: [N, C, H, W]."""
        blueprint = self.backbone.blueprint
        return self.views(indices, evaluation_view(blueprint.recipe, blueprint.size))

    def views(self, indices: Sequence[int], recipe: ViewRecipe) -> Tensor:
        """Return the recipe's single view of images ``indices``, in their order: [N, C, H, W]."""
        loader = _loader(Subset(self.source, indices), recipe)
        try:
            return torch.cat([batch.views[0][0].cpu() for batch in loader.epoch(0)])
        finally:
            loader.close()


def look(run: Run, images: int, splits: Splits | None = None) -> Sample:
    """Return features of at most ``images`` images of the run's data, held-out images if it has any.

    Runs with the same data get the same images. ``splits`` is the data of a run whose data has no path. Raise
    ConfigError or DataError if the network or the data are not available.
    """
    if run.config is None:
        raise ConfigError("its config.yaml is missing or invalid")
    backbone = from_run(run.path)
    splits = splits or _open(run)
    source = splits.val or splits.train
    chosen = np.arange(len(source))
    if len(source) > images:
        chosen = np.sort(np.random.RandomState(0).permutation(len(source))[:images])
    sample = Subset(source, chosen.tolist())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = _loader(sample, evaluation_view(backbone.blueprint.recipe, backbone.blueprint.size), device.type)
    try:
        rows = extract(backbone.network.to(device), loader, device).features.cpu()
        bad = loader.bad
    finally:
        loader.close()
        backbone.network.cpu()
    if bad:  # unreadable images have no features
        sample = Subset(sample, [i for i in range(len(sample)) if sample.describe(i) not in bad])
    if not rows.isfinite().all():
        raise ConfigError("its features are not finite: the run diverged")
    return Sample(backbone, sample, normalize(rows, dim=1), splits.val is not None)


def short(name: str, most: int = 40) -> str:
    """Return the end of a long name. The ends of paths differ, not their beginnings."""
    return name if len(name) <= most else "…" + name[1 - most :]


def class_name(classes: Sequence[str], label: int) -> str:
    """Return the name of a class, or its number."""
    return classes[label] if label < len(classes) else str(label)


def _open(run: Run) -> Splits:
    assert run.config is not None
    t, index = run.config.train, run.path / "index"
    if t.in_memory:
        name = str(t.data_path).removeprefix(IN_MEMORY)
        raise DataError(f"its data, {name}, was in memory and has no path. Use Result.report() in Python.")
    splits = open_source(t.data_path, t.val_path, weights=t.data_weights, cache=index if index.is_dir() else None)
    trained_on = (run.summary or {}).get("dataset", splits.name)
    if trained_on != splits.name:
        raise DataError(f"its data was {trained_on}, but its path now has {splits.name}")
    return splits


def _loader(source: Subset, recipe: ViewRecipe, device: str = "cpu") -> Loader:
    return Loader(source, recipe, _BATCH, device=device, threads=1, shuffle=False, drop_last=False)
