"""The data that Python passes to a training: paths, data sets, sources, splits, and lists of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...errors import ConfigError
from .base import Source
from .dataset import source_from_dataset
from .hugging_face import HuggingFaceSource, is_hugging_face, split_names
from .mixture import MixtureSource
from .open import Splits, mixed_splits, open_source


def in_memory_splits(data: Any, val: Any, weights: Sequence[float] = ()) -> Splits | None:
    """Return images without a path, or None if all are paths. Raise ConfigError for a combination that is unclear."""
    parts, held_out = _parts(data), _parts(val)
    if all(map(_is_path, parts)):
        if not all(map(_is_path, held_out)):
            raise ConfigError("val: is a data set in memory, but data is not. Give both as paths or as data sets.")
        return None
    for part in held_out:
        if _is_path(part) or isinstance(part, Splits | Mapping):
            raise ConfigError(f"val: must be a data set, because data is in memory, got {part!r}.")
    opened = [_splits(part) for part in parts]
    if held_out and any(isinstance(part, Splits | Mapping) for part in parts):
        raise ConfigError("val: data has its own held-out images. Leave val out.")
    splits = mixed_splits(opened, weights)
    sources = [_source(part, "val") for part in held_out]
    if not sources:
        return splits
    return Splits(splits.name, splits.train, _numbered_as(splits.train, sources), splits.damaged, splits.unused)


def as_paths(data: Any) -> Any:
    """Return a path or a list of paths as texts, and anything else unchanged."""
    parts = _parts(data)
    return [os.fspath(part) for part in parts] if parts and all(map(_is_path, parts)) else data


def _parts(data: Any) -> list[Any]:
    """Return the elements of a list of data sets or paths, and a list with anything else."""
    if data is None:
        return []
    if isinstance(data, list | tuple) and data and all(map(_is_data, data)):
        return list(data)
    return [data]


def _is_data(part: Any) -> bool:
    """Return whether an element of a list is a whole data set. The list is a data set of images otherwise."""
    if _is_path(part) or isinstance(part, Splits) or _is_source(part) or _is_dict_of_splits(part):
        return True
    image = isinstance(part, list | tuple | Mapping | bytes | bytearray | memoryview | np.ndarray | torch.Tensor)
    return not image and hasattr(part, "__len__") and hasattr(part, "__getitem__")


def _is_path(part: Any) -> bool:
    return isinstance(part, str | os.PathLike)


def _is_source(part: Any) -> bool:
    return callable(getattr(part, "read", None))


def _is_dict_of_splits(part: Any) -> bool:
    return isinstance(part, Mapping) and bool(part) and all(map(is_hugging_face, part.values()))


def _splits(part: Any) -> Splits:
    if isinstance(part, Splits):
        return part
    if _is_path(part):
        return open_source(os.fspath(part))
    if _is_dict_of_splits(part):
        training, held_out = split_names(list(part), "data")
        train = HuggingFaceSource(part[training], training)
        val = None if held_out is None else HuggingFaceSource(part[held_out], held_out, classes=train.classes)
        unused = tuple(name for name in part if name not in (training, held_out))
        return Splits(train.name, train, val, unused=unused)
    source = _source(part, "data")
    return Splits(source.name, source, None)


def _source(images: Any, name: str) -> Source:
    readable = hasattr(images, "__len__") and (hasattr(images, "__getitem__") or _is_source(images))
    if not readable and not is_hugging_face(images):
        kind = type(images).__name__
        raise ConfigError(f"{name}: must be a path, a map-style data set or a source, got {kind}.")
    source: Source = images if _is_source(images) else source_from_dataset(images)
    return source


def _numbered_as(train: Source, held_out: Sequence[Source]) -> Source:
    """Return held-out images as one source, whose labels count in the classes of the training images."""
    named = train.classes and any(source.classes for source in held_out)
    if len(held_out) == 1 and not (named and held_out[0].classes != train.classes):
        return held_out[0]
    return MixtureSource(held_out, classes=train.classes if named or train.labels is None else None)
