"""The k-NN accuracy before training, which a run measures once and stores in ``baseline.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.provenance import config_hash
from ..config.resolve import Config
from ..files import finite, write_text


@dataclass(frozen=True)
class Baseline:
    """The k-NN accuracy, from 0 to 1, of an untrained network and of raw pixels. None where it was not measured."""

    untrained: float | None = None
    pixels: float | None = None


def write_baseline(path: Path, baseline: Baseline, config: Config) -> None:
    """Write the values, and a hash of the settings that they belong to."""
    values = {"knn_top1_untrained": baseline.untrained, "knn_top1_pixels": baseline.pixels}
    write_text(path, json.dumps(finite(values) | {"config": config_hash(config)}) + "\n")


def read_baseline(path: Path, config: Config, *, resumed: bool) -> Baseline | None:
    """Return the stored values, or None without any.

    The values of a ``resumed`` run hold whatever settings were changed since. Others hold for the same configuration
    only: the folder may have the file of a run that ended before its first checkpoint.
    """
    try:
        content = json.loads(path.read_text())
        if resumed or content["config"] == config_hash(config):
            return Baseline(content["knn_top1_untrained"], content["knn_top1_pixels"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
