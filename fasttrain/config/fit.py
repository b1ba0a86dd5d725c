"""Fit a configuration to the number of images, once the data is known: the recipes for one's own photographs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import methods
from ..methods.base import power_of_two_below
from .recipes import recipe_names
from .resolve import Config, resolve

PHOTOS = "photos"
FEW_IMAGES = 100_000
"""Data of fewer images takes the recipe :data:`PHOTOS` unless a recipe is requested."""
_STEPS_PER_EPOCH = 20


@dataclass(frozen=True)
class _Length:
    """The length of a training: images to see in all, the range of its epochs, and the warm-up as a part of them."""

    images: int
    least: int
    most: int
    warmup: float = 0.1


_LENGTHS = {
    PHOTOS: _Length(5_000_000, least=100, most=1000),
    "photos-small": _Length(125_000, least=10, most=200),
    "adapt": _Length(500_000, least=10, most=200),
}
"""The recipes whose length, batch and sizes follow from the number of images."""


@dataclass(frozen=True)
class Fit:
    """A configuration that fits the data, and one line for each choice with its reason."""

    config: Config
    reasons: tuple[str, ...] = ()


def fit_to_data(config: Config, images: int, former: Mapping[str, Any] | None = None) -> Fit:
    """Return the configuration for a number of training images.

    Settings that the caller gave are not changed. ``former`` are the values of the run that continues, if any: they are
    used instead of new ones, so that a few more images do not change the schedule.
    """
    request = config.request
    if request is None:
        return Fit(config)
    requested, former = {**request.file, **request.values}, former or {}
    recipe, reasons = _recipe(config, requested, images, former)
    if recipe == config.recipe and recipe not in _LENGTHS:
        return Fit(config)
    values = {**request.values, "recipe": recipe}
    merged = resolve(config.method, values, request.file, plugin=config.plugin)
    if recipe in _LENGTHS:
        derived = _derived(merged, images, _LENGTHS[recipe])
        chosen = {name: former.get(name, value) for name, (value, _) in derived.items() if name not in requested}
        reasons += [f"{name} {value:g}: {derived[name][1]}" for name, value in chosen.items()]
        merged = resolve(config.method, {**values, **chosen}, request.file, plugin=config.plugin)
    train = replace(merged.train, output_dir=config.train.output_dir)  # Python chooses it after the request
    return Fit(replace(merged, train=train), tuple(reasons))


def _recipe(
    config: Config, requested: Mapping[str, Any], images: int, former: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Return the recipe for a number of images, with the reason if nobody gave it."""
    if "recipe" in requested or requested.get("data_path") is None:
        return config.recipe, []
    recipe = former.get("recipe") or (PHOTOS if images < FEW_IMAGES else config.recipe)
    if recipe == config.recipe or recipe not in recipe_names(methods.load(config.method).recipes or config.method):
        return config.recipe, []
    return recipe, [f"recipe {recipe}: the data has fewer than {FEW_IMAGES:,} images. --recipe chooses another."]


def _derived(config: Config, images: int, length: _Length) -> dict[str, tuple[Any, str]]:
    """Return the settings that follow from the number of images, each with its reason."""
    t = config.train
    epochs = min(max(round(length.images / images), length.least), length.most)
    least = min(4, power_of_two_below(images))
    batch = min(t.batch_size_per_gpu, max(power_of_two_below(images / _STEPS_PER_EPOCH), least))
    values: dict[str, tuple[Any, str]] = {
        "epochs": (epochs, f"about {epochs * images:,} images are seen"),
        "warmup_epochs": (max(float(round(length.warmup * epochs)), 1.0), f"{length.warmup:.0%} of the epochs"),
        "batch_size_per_gpu": (batch, f"an epoch has {images // batch:,} steps"),
    }
    for name, per in methods.load(config.method).sized.items():
        values[name] = (per.value(images), f"about one for every {per.images} images")
    return values
