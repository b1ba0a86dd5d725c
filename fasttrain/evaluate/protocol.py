"""What ``fasttrain eval`` measures of a network on a data set, and in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError
from ..pipelines import Source, Splits, Subset, View, ViewRecipe, evaluation_view
from ..pretrained import Backbone
from .alignment import alignment, uniformity
from .cache import FeatureCache
from .features import Features
from .knn import knn
from .linear import linear_probe
from .logistic import few_shot, logistic_regression
from .spectrum import alpha_req, lidar, rankme, spectrum_stride

Metric = Literal["knn", "linear", "logistic", "few_shot", "spectrum", "views"]
METRICS: tuple[Metric, ...] = get_args(Metric)
LABELLED = METRICS[:4]
LABEL_FREE = METRICS[4:]
_SMALL = 64  # pixels; SimCLR and MoCo blur no smaller images


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how much of it."""

    metrics: tuple[Metric, ...] = METRICS
    ks: tuple[int, ...] = (10, 20, 200)
    linear_epochs: int = 100
    fractions: tuple[float, ...] = (0.01, 0.1)
    draws: int = 5
    lidar_images: int = 1000
    lidar_views: int = 10
    seed: int = 0


def augmented_view(recipe: ViewRecipe, size: int, count: int) -> ViewRecipe:
    """``count`` random views as MoCo v2 has them, the same for every network, so that LiDAR and alignment compare.

    Crops of 20 to 100 % of the area, flips, colour jitter of 0.4 (hue 0.1), grey for one in five and, above 64 pixels,
    blur.
    """
    colour = recipe.channels == 3
    view = View(
        size=size,
        count=count,
        scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1) if colour else (0.4, 0.4, 0.0, 0.0),
        grey=0.2 if colour else 0.0,
        blur=0.5 if size > _SMALL else 0.0,
    )
    return dataclasses.replace(recipe, views=(view,))


def evaluate(
    backbone: Backbone,
    splits: Splits,
    cache: FeatureCache,
    protocol: Protocol,
    *,
    size: int,
    note: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """All figures, by name; None on ranks but the first. Collective. Nothing is fitted on the held-out images.

    The label-based figures need labels and held-out images; where they are missing a line says so. Raises ConfigError
    for features that are not numbers.
    """
    pixels = backbone.blueprint.recipe
    clean, wanted = evaluation_view(pixels, size), protocol.metrics
    labelled = [name for name in LABELLED if name in wanted]
    if labelled and (missing := _missing(splits)):
        note(f"left out, since the data has no {missing}: {', '.join(labelled)}")
        labelled = []
    train = cache.views(splits.train, clean) if labelled or "spectrum" in wanted else None
    val = cache.views(splits.val, clean) if labelled and splits.val is not None else None
    views = None
    if "views" in wanted:
        few = _spaced(splits.train, protocol.lidar_images)
        random = augmented_view(pixels, size, protocol.lidar_views)
        views = cache.views(few, random, seed=protocol.seed)
    if not cache.is_main:
        return None
    for found in (train, val, views):
        if found is not None and not found.features.isfinite().all():
            raise ConfigError(f"{backbone.name}: its features are not all numbers; choose an earlier checkpoint")
    figures: dict[str, Any] = {}
    if train is not None and val is not None:
        figures |= _with_labels(_clean(train), _clean(val), labelled, protocol, note)

    def enough(found: Features, name: str) -> bool:
        if len(found.features) < 2:
            note(f"left out, since one image alone can be read: {name}")
        return len(found.features) > 1

    if train is not None and "spectrum" in wanted and enough(train, "spectrum"):
        note("spectrum")
        figures |= _spectrum(_clean(train))
    if views is not None and enough(views, "views"):
        note("augmented views")
        figures |= {"lidar": lidar(views.features), "alignment": alignment(views.features)}
        figures |= {"lidar_images": len(views.features), "lidar_views": protocol.lidar_views}
    return figures


def _with_labels(
    train: Features, val: Features, wanted: Sequence[str], protocol: Protocol, note: Callable[[str], None]
) -> dict[str, Any]:
    """The figures that need labels."""
    assert train.labels is not None
    assert val.labels is not None
    data = (train.features, train.labels, val.features, val.labels)
    figures: dict[str, Any] = {}
    if "knn" in wanted:
        note(f"k-NN over {len(train.features):,} x {train.features.shape[1]} with {len(val.features):,} queries")
        figures["knn"] = {str(k): dataclasses.asdict(found) for k, found in knn(*data, ks=protocol.ks).items()}
    if "linear" in wanted:
        note(f"linear probe, {protocol.linear_epochs} epochs")
        figures["linear"] = dataclasses.asdict(linear_probe(*data, epochs=protocol.linear_epochs, seed=protocol.seed))
    if "logistic" in wanted:
        note("logistic regression")
        figures["logistic"] = dataclasses.asdict(logistic_regression(*data, seed=protocol.seed))
    if "few_shot" in wanted:
        note(f"few-shot, {protocol.draws} draws")
        figures["few_shot"] = [
            dataclasses.asdict(few_shot(*data, fraction=fraction, draws=protocol.draws, seed=protocol.seed))
            for fraction in protocol.fractions
        ]
    return figures


def _spectrum(train: Features) -> dict[str, Any]:
    """Of the training images' features, at most 25,600 of them, evenly spaced."""
    rows = train.features[:: spectrum_stride(len(train.features))]
    return {
        "rankme": rankme(rows),
        "alpha_req": alpha_req(rows),
        "uniformity": uniformity(rows),
        "spectrum_images": len(rows),
    }


def _clean(found: Features) -> Features:
    return Features(found.features[:, 0], found.labels)


def _spaced(source: Source, count: int) -> Source:
    """``count`` images, evenly spaced, so that all classes are among them."""
    count = min(count, len(source))
    return Subset(source, [k * len(source) // count for k in range(count)])


def _missing(splits: Splits) -> str | None:
    if splits.train.labels is None:
        return "labels (class sub-folders)"
    if splits.val is None:
        return "held-out images (--val_path)"
    return None if splits.val.labels is not None else "labels for its held-out images"
