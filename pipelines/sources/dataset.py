"""A source of any map-style torch data set."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ...errors import DataError
from .base import class_numbers, content_stamp
from .decode import as_raster, from_pil
from .headers import BadImageError
from .hugging_face import HuggingFaceSource, is_hugging_face
from .labels import IMAGE_NAMES, LABEL_NAMES, Labels, given_labels, labels_of_values, no_label
from .listing import Listing, sampled_digest

_FORMS = "a PIL image, encoded bytes, a NumPy array [H, W, C] or [H, W], or a tensor [C, H, W], of 1 to 16 channels"
log = logging.getLogger("fasttrain.data")


class MapDataset(Protocol):
    """The interface of a data set: ``torch.utils.data.Dataset`` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class DatasetSource:
    """See ``source_from_dataset``. ``first`` is an item that all others must resemble."""

    def __init__(self, dataset: MapDataset, first: Any, labels: Labels, name: str) -> None:
        self.dataset, self.name = dataset, name
        self.labels, self.classes, self._reason = labels.numbers, labels.names, labels.reason
        self._place = _image_place(first)
        content = _content(self._image(first, 0), self.describe(0))
        self.encoded = content.ndim == 1
        self.channels = 3 if self.encoded else int(content.shape[-1])

    @cached_property
    def listing(self) -> Listing:
        """The findings about the data set."""
        origin = "" if self.labels is None else "the data set"
        return Listing(len(self), self.classes, origin, self._reason, digest=sampled_digest(self))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> NDArray[Any]:
        """Return the bytes or pixels of item ``i``. Raise OSError if the data set raises one."""
        content = _content(self._image(self.dataset[i], i), self.describe(i))
        if (content.ndim == 1) != self.encoded:
            raise DataError(f"{self.describe(i)}: some items are bytes, others pixels; make all of them the same")
        return content

    def describe(self, i: int) -> str:
        """Return the name of the data set and the number of the item."""
        return f"{self.name} {i}"

    def stamp(self, i: int) -> str:
        """Return a hash of the content of item ``i``."""
        return content_stamp(self.read(i))

    def _image(self, item: Any, i: int) -> Any:
        try:
            return item if self._place is None else item[self._place]
        except (KeyError, IndexError, TypeError):
            raise DataError(f"{self.describe(i)}: has no {self._place!r}, unlike the first item") from None


def source_from_dataset(
    dataset: MapDataset,
    *,
    labels: ArrayLike | None = None,
    labelled: bool = True,
    classes: Sequence[str] = (),
    name: str | None = None,
) -> DatasetSource | HuggingFaceSource:
    """Return a source of the images of a map-style data set, such as a ``torch.utils.data.Dataset``.

    An item is an image, a tuple ``(image, label, ...)``, or a dict with the image under ``image``, ``img`` or a similar
    key and the label under ``label`` or ``target``. A ``datasets.Dataset`` of Hugging Face has its columns by type, see
    :mod:`fasttrain.pipelines.sources.hugging_face`. An image has one of these forms. Sizes may differ:

    - a PIL image. Its EXIF orientation is ignored. Modes other than grey and RGB become RGB, without alpha, but 16-bit,
      32-bit and float modes keep their values;
    - the bytes of an image file;
    - pixels: a NumPy array [H, W, C] or [H, W], or a tensor [C, H, W] or [H, W], of any real type. C is 1 to 16.

    Values that are not 8-bit need the ``pixel_range`` of the recipe's pixels.

    ``labels`` are class numbers or names [N]. Without them the data set's ``targets`` or ``labels`` are used, also
    through ``Subset`` and ``ConcatDataset``. If it has none and its items have a label, every item is read once for it,
    and a warning reports this; ``labelled=False`` skips it. Boxes, vectors, dicts and None are no labels: the source
    then has none, and a warning gives the reason. Several threads read items at the same time. Items must not be
    random, or a run cannot be repeated: the view recipe does the augmentation. Raises DataError if no item can be
    read, an image has another form, or given ``labels`` do not fit.
    """
    name = name or type(dataset).__name__
    if is_hugging_face(dataset):
        rows = HuggingFaceSource(dataset, name, labels=labels, labelled=labelled)
        rows.classes = tuple(classes) or rows.classes
        return rows
    first = _first_item(dataset, name)
    if labels is not None:
        own = given_labels(labels, len(dataset), name)
    else:
        own = _labels(dataset, first, name) if labelled else Labels(reason="labelled=False leaves them out")
    names = tuple(classes) or own.names or (_class_names(dataset, own.numbers) if labels is None else ())
    return DatasetSource(dataset, first, dataclasses.replace(own, names=names), name)


def _first_item(dataset: MapDataset, name: str) -> Any:
    """Return the first item that can be read."""
    reason = "the data set is empty"
    for i in range(len(dataset)):
        try:
            return dataset[i]
        except OSError as error:
            reason = f"none of its {len(dataset)} items can be read; {error}"
    raise DataError(f"{name}: {reason}")


def _image_place(item: Any) -> Any:
    """Return the key or the position of an item's image. None is the item itself."""
    if isinstance(item, Mapping):
        named = [key for key in IMAGE_NAMES if key in item]
        return next(iter([*named, *(key for key, value in item.items() if _may_be_image(value))]), "image")
    if isinstance(item, tuple | list):
        return next((k for k, part in enumerate(item) if _may_be_image(part)), 0)
    return None


def _label_place(item: Any, image: Any) -> Any:
    """Return the key or the position of an item's label, or None if it has none."""
    if isinstance(item, Mapping):
        return next((key for key in LABEL_NAMES if key in item and key != image), None)
    after = 0 if image is None else image + 1
    return after if isinstance(item, tuple | list) and after < len(item) else None


def _may_be_image(value: Any) -> bool:
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim > 0
    return isinstance(value, bytes | bytearray | memoryview) or (hasattr(value, "convert") and hasattr(value, "mode"))


def _labels(dataset: MapDataset, first: Any, name: str) -> Labels:
    """Return the labels of the attributes or of the items. A warning gives the reason if they are no classes."""
    place = _label_place(first, _image_place(first))
    known = _known_labels(dataset)
    if known is None and place is None:
        return Labels(reason="its items have no label")
    if known is not None:
        labels = labels_of_values(known, len(dataset))
    elif reason := no_label(first[place]):
        labels = Labels(reason=reason)
    else:
        text = "%s: has no targets and no labels of its length; reading all %d items once for their labels"
        log.warning(text, name, len(dataset))
        labels = labels_of_values([_label(dataset, i, place, first) for i in range(len(dataset))], len(dataset))
    if labels.reason:
        log.warning("%s: %s; training without labels", name, labels.reason)
        return labels
    numbers = class_numbers(labels.numbers, len(dataset), name) if labels.numbers is not None else None
    return dataclasses.replace(labels, numbers=numbers, reason="some are negative" if numbers is None else "")


def _label(dataset: MapDataset, i: int, place: Any, first: Any) -> Any:
    try:
        return dataset[i][place]
    except OSError:  # unused: an item that cannot be read is left out
        return first[place] if isinstance(first[place], str) else 0
    except (KeyError, IndexError, TypeError):
        return None
    except Exception as error:  # the data set's own code raises whatever it raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{type(dataset).__name__} {i}: cannot be read for its label; {reason}") from error


def _known_labels(dataset: Any) -> Any:
    """Return the labels that a data set has without reading its items, or None."""
    if isinstance(dataset, torch.utils.data.Subset):
        whole = _known_labels(dataset.dataset)
        return None if whole is None else [whole[int(i)] for i in dataset.indices]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [_known_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    for attribute in ("targets", "labels"):
        labels: Any = getattr(dataset, attribute, None)
        if hasattr(labels, "__len__") and len(labels) == len(dataset) and not isinstance(labels, str | Mapping):
            column = getattr(labels, "shape", ()) == (len(dataset), 1)
            labels = labels.reshape(-1) if column else labels
            return labels.tolist() if hasattr(labels, "tolist") else labels
    return None


def _class_names(dataset: Any, numbers: NDArray[np.int64] | None) -> tuple[str, ...]:
    """Return the data set's own names of its classes, if it has one for every label."""
    while isinstance(dataset, torch.utils.data.Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if numbers is None or not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names) if numbers.max(initial=-1) < len(names) else ()


def _content(image: Any, name: str) -> NDArray[Any]:
    """Return the encoded bytes [length] or pixels [H, W, C] of an item's image."""
    if isinstance(image, bytes | bytearray | memoryview):
        return np.frombuffer(image, np.uint8)
    pixels = image
    if isinstance(image, torch.Tensor):
        pixels = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy(force=True)
    elif hasattr(image, "convert") and hasattr(image, "mode"):
        raster = from_pil(image)
        pixels = raster.values[..., : raster.channels]
    if not isinstance(pixels, np.ndarray):
        raise DataError(f"{name}: the image is a {type(image).__name__}; give {_FORMS}")
    if pixels.ndim == 1 and pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    try:
        return np.ascontiguousarray(as_raster(pixels).values)
    except BadImageError:
        raise DataError(f"{name}: the image is {image.dtype} {list(image.shape)}; give {_FORMS}") from None
