"""The figures of ``fasttrain eval``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError
from ..pipelines import Size, Splits, View, ViewRecipe, evaluation_view, sides
from ..pretrained import Backbone
from .alignment import alignment, uniformity
from .cache import FeatureCache
from .draws import spaced
from .features import Features
from .knn import knn
from .linear import linear_probe
from .logistic import few_shot, logistic_regression
from .spectrum import alpha_req, lidar, rankme, spectrum_stride

Metric = Literal["knn", "linear", "logistic", "few_shot", "spectrum", "views"]
METRICS: tuple[Metric, ...] = get_args(Metric)
LABELLED = METRICS[:4]
_SMALL = 64  # pixels; SimCLR and MoCo do not blur smaller images


@dataclass(frozen=True)
class Protocol:
    """The figures to measure, and their settings."""

    metrics: tuple[Metric, ...] = METRICS
    ks: tuple[int, ...] = (10, 20, 200)
    linear_epochs: int = 100
    fractions: tuple[float, ...] = (0.01, 0.1)
    draws: int = 5
    lidar_images: int = 1000
    lidar_views: int = 10
    seed: int = 0


def augmented_view(recipe: ViewRecipe, size: Size, count: int) -> ViewRecipe:
    """Return a recipe of ``count`` random views in MoCo v2's style, so that LiDAR and alignment of networks compare.

    It has crops of 20 to 100 % of the area, flips, colour jitter of 0.4 (hue 0.1), grey with probability 0.2, and
    above 64 pixels blur.
    """
    colour = recipe.channels == 3
    view = View(
        size=size,
        count=count,
        scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1) if colour else (0.4, 0.4, 0.0, 0.0),
        grey=0.2 if colour else 0.0,
        blur=0.5 if max(sides(size)) > _SMALL else 0.0,
    )
    return dataclasses.replace(recipe, views=(view,))


def evaluate(
    backbone: Backbone,
    splits: Splits,
    cache: FeatureCache,
    protocol: Protocol,
    *,
    size: Size,
    note: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Return all figures by name, or None on ranks other than 0. Collective. Nothing is fitted on held-out images.

    Without labels or held-out images, ``note`` gets a line and the figures that need them are left out. Raise
    ConfigError for features that are not finite.
    """
    pixels = backbone.blueprint.recipe
    clean, metrics = evaluation_view(pixels, size), protocol.metrics
    labelled = [name for name in LABELLED if name in metrics]
    if labelled and (missing := _missing(splits)):
        note(f"left out, because the data has no {missing}: {', '.join(labelled)}")
        labelled = []
    train = cache.views(splits.train, clean) if labelled or "spectrum" in metrics else None
    val = cache.views(splits.val, clean) if labelled and splits.val is not None else None
    views = None
    if "views" in metrics:
        few = spaced(splits.train, protocol.lidar_images)
        random = augmented_view(pixels, size, protocol.lidar_views)
        views = cache.views(few, random, seed=protocol.seed)
    if not cache.is_main:
        return None
    for part in (train, val, views):
        if part is not None and not part.features.isfinite().all():
            raise ConfigError(f"{backbone.name}: its features are not finite. Choose an earlier checkpoint.")
    figures: dict[str, Any] = {}
    if train is not None and val is not None:
        figures |= _with_labels(_clean(train), _clean(val), labelled, protocol, note)

    def enough(part: Features, name: str) -> bool:
        if len(part.features) < 2:
            note(f"left out, because only one image can be read: {name}")
        return len(part.features) > 1

    if train is not None and "spectrum" in metrics and enough(train, "spectrum"):
        note("spectrum")
        figures |= _spectrum(_clean(train))
    if views is not None and enough(views, "views"):
        note("augmented views")
        figures |= {"lidar": lidar(views.features), "alignment": alignment(views.features)}
        figures |= {"lidar_images": len(views.features), "lidar_views": protocol.lidar_views}
    return figures


def _with_labels(
    train: Features, val: Features, metrics: Sequence[str], protocol: Protocol, note: Callable[[str], None]
) -> dict[str, Any]:
    """Return the figures that need labels."""
    assert train.labels is not None
    assert val.labels is not None
    data = (train.features, train.labels, val.features, val.labels)
    figures: dict[str, Any] = {}
    if "knn" in metrics:
        note(f"k-NN over {len(train.features):,} x {train.features.shape[1]} with {len(val.features):,} queries")
        figures["knn"] = {str(k): dataclasses.asdict(accuracy) for k, accuracy in knn(*data, ks=protocol.ks).items()}
    if "linear" in metrics:
        note(f"linear probe, {protocol.linear_epochs} epochs")
        figures["linear"] = dataclasses.asdict(linear_probe(*data, epochs=protocol.linear_epochs, seed=protocol.seed))
    if "logistic" in metrics:
        note("logistic regression")
        figures["logistic"] = dataclasses.asdict(logistic_regression(*data, seed=protocol.seed))
    if "few_shot" in metrics:
        note(f"few-shot, {protocol.draws} draws")
        figures["few_shot"] = [
            dataclasses.asdict(few_shot(*data, fraction=fraction, draws=protocol.draws, seed=protocol.seed))
            for fraction in protocol.fractions
        ]
    return figures


def _spectrum(train: Features) -> dict[str, Any]:
    """Return the figures of the training images' spectrum, from at most 25,600 evenly spaced images."""
    rows = train.features[:: spectrum_stride(len(train.features))]
    return {
        "rankme": rankme(rows),
        "alpha_req": alpha_req(rows),
        "uniformity": uniformity(rows),
        "spectrum_images": len(rows),
    }


def _clean(one_view: Features) -> Features:
    return Features(one_view.features[:, 0], one_view.labels)


def _missing(splits: Splits) -> str | None:
    if splits.train.labels is None:
        return "labels (class sub-folders)"
    if splits.val is None:
        return "held-out images (--val_path)"
    return None if splits.val.labels is not None else "labels for its held-out images"
