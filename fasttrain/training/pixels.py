"""The pixel format of a run: measured on its training images once, and stored in its config.yaml."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..config.resolve import Config, read_yaml
from ..distributed.world import World, all_gather_object
from ..errors import ConfigError, DataError
from ..pipelines import Source, ViewRecipe, measured

_MEASURED = ("channels", "mean", "std", "pixel_range")


def settled(config: Config, source: Source, *, resumed: Path | None = None) -> tuple[Config, list[str]]:
    """Return the configuration with the pixel format for the images of a source, and lines that report it.

    The format of the run ``resumed`` is used again. Raise ConfigError if the images do not fit the
    settings, and DataError if they do not fit together.
    """
    stated = set() if config.request is None else set(config.request.pixels)
    pixels = config.views.pixels
    stored = {} if resumed is None else _stored(resumed)
    values = {name: value for name, value in stored.items() if name not in stated}
    try:
        if values:
            pixels = dataclasses.replace(pixels, **values)
            stated |= values.keys()
        pixels, lines = measured(source, pixels, stated)
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    return dataclasses.replace(config, views=ViewRecipe(config.views.views, pixels=pixels)), lines


def settled_on_every_rank(
    config: Config, source: Source, world: World, *, resumed: Path | None = None
) -> tuple[Config, list[str]]:
    """Return the same as :func:`settled` on every rank. Only rank 0 reads images. Collective."""
    result: tuple[Config, list[str]] | Exception | None = None
    if world.is_main:
        try:
            result = settled(config, source, resumed=resumed)
        except (ConfigError, DataError) as error:
            result = error
    own = result if result is None or isinstance(result, Exception) else (result[0].views.pixels, result[1])
    shared: Any = all_gather_object(world, own)[0]
    if isinstance(shared, Exception):
        raise shared
    pixels, lines = shared
    return dataclasses.replace(config, views=ViewRecipe(config.views.views, pixels=pixels)), lines


def _stored(run: Path) -> dict[str, Any]:
    """Return the pixel format in a run's config.yaml, without a range that the run did not need."""
    try:
        flat = read_yaml(run / "config.yaml")
    except ConfigError:  # a checkpoint may lie alone
        return {}
    values = {name: flat[name] for name in _MEASURED if flat.get(name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
