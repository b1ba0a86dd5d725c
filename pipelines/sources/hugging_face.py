"""Data sets of Hugging Face: ``datasets.Dataset`` objects, folders of ``save_to_disk``, and Parquet files.

Rows are read as they are stored: the bytes of an image file, which DALI decodes. The image is the column of the type
``Image``. The label is a column of the type ``ClassLabel``, else a column named ``label`` or similarly.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import DataError
from .base import class_numbers, content_stamp, file_stamp, read_file
from .labels import IMAGE_NAMES, LABEL_NAMES, Labels, given_labels, labels_of_values, renumbered
from .listing import Listing, sampled_digest

PREFIX = "hf:"
"""Begins a ``data_path`` that is a data set of Hugging Face."""
_TRAINING = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "test")


class HuggingFaceSource:
    """The images of a ``datasets.Dataset``. Its format and transform are not applied.

    ``classes`` fixes the class names, which a held-out split needs. ``files`` is a stamp of the files that hold the
    rows. Without it, the stamp of an image is a hash of its content. Raises DataError if no column has images, or if a
    class is not in ``classes``.
    """

    channels = 3
    encoded = True

    def __init__(
        self,
        dataset: Any,
        name: str,
        *,
        labels: ArrayLike | None = None,
        labelled: bool = True,
        classes: Sequence[str] | None = None,
        files: str = "",
    ) -> None:
        datasets = _library(name)
        self.name, self._files = name, files
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "select_columns"):
            raise DataError(f"{name}: a stream has no length and no order; load it without streaming")
        if not len(dataset):
            raise DataError(f"{name}: the data set is empty")
        column, self._notes = _image_column(dataset.features, datasets, name)
        self._origin = "labels"
        if labels is not None:
            result = given_labels(labels, len(dataset), name)
        elif labelled:
            result, self._origin = _labels(dataset, column, datasets, name)
        else:
            result = Labels(reason="labelled=False leaves them out")
        self._reason, self.labels, self.classes = result.reason, result.numbers, result.names
        if classes is not None and not classes:
            self._reason, self.labels, self.classes = "the training images have no labels", None, ()
        elif classes is not None and self.labels is not None:
            self.labels = renumbered(self.labels, self.classes, classes, name)
            self.classes = tuple(classes)
        images = dataset.with_format(None).select_columns([column])
        self._column, self._images = column, images.cast_column(column, datasets.Image(decode=False))

    @cached_property
    def listing(self) -> Listing:
        """The findings about the data set."""
        origin = "" if self.labels is None else self._origin
        return Listing(len(self), self.classes, origin, self._reason, notes=self._notes, digest=sampled_digest(self))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return the bytes of the image in row ``i``. Raise OSError if it cannot be read."""
        image = self._images[int(i)][self._column]
        if image is None:
            raise OSError("the row has no image")
        if image["bytes"] is not None:
            return np.frombuffer(image["bytes"], np.uint8)
        return read_file(image["path"])

    def describe(self, i: int) -> str:
        """Return the name of the data set and the number of the row."""
        return f"{self.name} row {i}"

    def stamp(self, i: int) -> str:
        """Return the stamp of the files and the number of the row, or a hash of the image's content."""
        return f"{self._files} {i}" if self._files else content_stamp(self.read(i))


def is_hugging_face(data: object) -> bool:
    """Return whether an object is a data set of the package ``datasets``, without importing it."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(data).__mro__}
    return not kinds.isdisjoint({"datasets.Dataset", "datasets.IterableDataset"})


def open_splits(path: str) -> tuple[HuggingFaceSource, HuggingFaceSource | None, tuple[str, ...]]:
    """Open ``hf:PATH``. Return the training split, the held-out split if there is one, and the names of the others.

    The held-out split is ``val``, ``valid`` or ``validation``, else ``test``. Raises DataError in one line if the path
    is not local or not readable.
    """
    splits = _load(path)
    training, held_out = split_names(list(splits), path)
    train = _source(splits, training, path, None)
    val = None if held_out is None else _source(splits, held_out, path, train.classes)
    return train, val, tuple(split for split in splits if split not in (training, held_out))


def open_held_out(path: str, classes: Sequence[str]) -> HuggingFaceSource:
    """Open the held-out split at ``hf:PATH``, or the only split. The labels count in ``classes``."""
    splits = _load(path)
    training, held_out = split_names(list(splits), path)
    return _source(splits, held_out or training, path, classes)


def name_of(path: str) -> str:
    """Return the last part of ``hf:PATH``."""
    return _root(path).resolve().name


def _root(path: str) -> Path:
    return Path(path.removeprefix(PREFIX)).expanduser()


def _source(splits: Mapping[str, Any], split: str, path: str, classes: Sequence[str] | None) -> HuggingFaceSource:
    title = name_of(path) if len(splits) == 1 else f"{name_of(path)} {split}"
    return HuggingFaceSource(splits[split], title, classes=classes, files=_files(splits[split], split))


def split_names(names: Sequence[str], path: str) -> tuple[str, str | None]:
    """Return the names of the training split and of the held-out split, if any."""
    lower = {name.lower(): name for name in reversed(names)}
    held_out = next((lower[name] for name in _HELD_OUT if name in lower), None)
    training = next((lower[name] for name in _TRAINING if name in lower), None)
    if training is None and len(names) == 1:
        return names[0], None
    if training is None:
        raise DataError(f"{path}: has no split 'train' but {', '.join(names)}; save one of them and give its folder")
    return training, held_out


def _load(path: str) -> Mapping[str, Any]:
    """Return the splits at ``hf:PATH`` by name."""
    root = _root(path)
    if not root.exists():
        hint = ""
        if len(root.parts) == 2 and not root.is_absolute():
            hint = f": python -c \"import datasets; datasets.load_dataset('{root}').save_to_disk('DIR')\", then hf:DIR"
        raise DataError(f"{path}: no such local folder or file; save the data set first{hint}")
    datasets = _library(path)
    silent, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below is the only line
    datasets.disable_progress_bars()
    try:
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            stored = datasets.load_from_disk(str(root))
            return dict(stored) if isinstance(stored, Mapping) else {"train": stored}
        if root.is_file() and root.suffix == ".parquet":
            return dict(datasets.load_dataset("parquet", data_files={"train": str(root)}))
        if root.is_dir() and any(root.rglob("*.parquet")):
            return dict(datasets.load_dataset(str(root)))
    except Exception as error:  # the package and Arrow raise errors of many kinds
        cause = error.__cause__ or error  # the package's own error says only that there was one
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
        raise DataError(f"{path}: cannot be opened; {reason}") from None
    finally:
        datasets.logging.set_verbosity(level)
        if not silent:
            datasets.enable_progress_bars()
    raise DataError(f"{path}: holds no data set; give a folder that save_to_disk wrote, or Parquet files")


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{name}: needs the package datasets; pip install 'fasttrain[hf]'") from None
    return datasets


def _files(dataset: Any, split: str) -> str:
    """Return a stamp of the files that hold a split's rows, or an empty text if it is in memory."""
    return (
        " ".join([split, *(file_stamp(file["filename"]) for file in dataset.cache_files)])
        if dataset.cache_files
        else ""
    )


def _image_column(features: Mapping[str, Any], datasets: Any, name: str) -> tuple[str, tuple[str, ...]]:
    """Return the column of the images and, if there are several, a note about the choice."""
    columns = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    if not columns:  # Parquet files of other programs have no types of Hugging Face
        columns = [column for column, kind in features.items() if _may_hold_images(column, kind, datasets)]
    if not columns:
        raise DataError(f"{name}: no column has the type Image; its columns are {', '.join(features)}")
    column = next((column for column in IMAGE_NAMES if column in columns), columns[0])
    note = f"{name}: the images are the column {column} of {', '.join(columns)}"
    return column, (note,) if len(columns) > 1 else ()


def _may_hold_images(column: str, kind: Any, datasets: Any) -> bool:
    if isinstance(kind, Mapping):
        return set(kind) == {"bytes", "path"}
    binary = isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")
    return binary and column.lower() in IMAGE_NAMES


def _labels(dataset: Any, image: str, datasets: Any, name: str) -> tuple[Labels, str]:
    """Return the labels of a data set's rows, and their origin."""
    kinds = dataset.features
    classes = [column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    named = [column for column in LABEL_NAMES if column in kinds and column != image]
    column = next((column for column in (*(c for c in named if c in classes), *classes, *named)), None)
    if column is None:
        return Labels(reason="no column is a label"), ""
    values = dataset.with_format("arrow").select_columns([column])[:][column].to_pylist()
    result = labels_of_values(values, len(dataset))
    if result.reason:
        return Labels(reason=f"column {column}: {result.reason}"), ""
    assert result.numbers is not None
    numbers = class_numbers(result.numbers, len(dataset), name)
    if numbers is None:
        return Labels(reason=f"column {column}: some are negative"), ""
    names = tuple(kinds[column].names) if column in classes else result.names
    if not names:
        values, numbers = np.unique(numbers, return_inverse=True)
        names = tuple(map(str, values))
    return Labels(numbers.astype(np.int64), names), f"the column {column}"


def is_path(path: object) -> bool:
    """Return whether a ``data_path`` begins with ``hf:``."""
    return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(PREFIX)
