"""A source of any map-style torch data set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ...errors import DataError
from .base import class_numbers, content_stamp
from .listing import Listing, sampled_digest

_FORMS = "a PIL image, encoded bytes, a NumPy array uint8 [H, W, C] or [H, W], or a tensor uint8 [C, H, W]"
log = logging.getLogger("fasttrain.data")


class MapDataset(Protocol):
    """The interface of a data set: ``torch.utils.data.Dataset`` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class DatasetSource:
    """See ``source_from_dataset``. ``first`` is an image that all others must resemble."""

    def __init__(
        self, dataset: MapDataset, first: Any, labels: NDArray[np.int64] | None, classes: Sequence[str], name: str
    ) -> None:
        self.dataset, self.labels, self.classes, self.name = dataset, labels, tuple(classes), name
        content = _content(first, self.describe(0))
        self.encoded = content.ndim == 1
        self.channels = 3 if self.encoded else int(content.shape[-1])

    @cached_property
    def listing(self) -> Listing:
        """The findings about the data set."""
        origin, reason = ("", "it has no labels") if self.labels is None else ("the data set", "")
        return Listing(len(self), self.classes, origin, reason, digest=sampled_digest(self))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return the bytes or pixels of item ``i``. Raise OSError if the data set raises one."""
        content = _content(_image(self.dataset[i]), self.describe(i))
        if (content.ndim == 1) != self.encoded:
            raise DataError(f"{self.describe(i)}: some items are bytes, others pixels; make all of them the same")
        return content

    def describe(self, i: int) -> str:
        """Return the name of the data set and the number of the item."""
        return f"{self.name} {i}"

    def stamp(self, i: int) -> str:
        """Return a hash of the content of item ``i``."""
        return content_stamp(self.read(i))


def source_from_dataset(
    dataset: MapDataset,
    *,
    labels: ArrayLike | None = None,
    labelled: bool = True,
    classes: Sequence[str] = (),
    name: str | None = None,
) -> DatasetSource:
    """Return a source of the images of a map-style data set. Its items are ``image`` or ``(image, label, ...)``.

    An image has one of these forms. Sizes may differ:

    - a PIL image. Its EXIF orientation is ignored. Modes other than grey and RGB become RGB, without alpha;
    - the bytes of an image file, which DALI decodes;
    - pixels: a NumPy array uint8 [H, W, C] or [H, W], or a tensor uint8 [C, H, W] or [H, W]. C is 1, 3 or 4, and the
      fourth channel is dropped.

    ``labels`` are class numbers [N]. Without them the data set's ``targets`` or ``labels`` are used, also through
    ``Subset`` and ``ConcatDataset``. If it has none and its items are pairs, every item is read once for its label, and
    a warning reports this; ``labelled=False`` skips it. Several threads read items at the same time. Items must not be
    random, or a run cannot be repeated: the view recipe does the augmentation. Raises DataError if no item can be
    read, an image has another form, or the labels do not fit.
    """
    name = name or type(dataset).__name__
    first = _first_item(dataset, name)
    if labels is None and labelled:
        labels = _labels(dataset, first, name)
    numbers = None if labels is None else class_numbers(labels, len(dataset), name)
    return DatasetSource(dataset, _image(first), numbers, classes, name)


def _first_item(dataset: MapDataset, name: str) -> Any:
    """Return the first item that can be read."""
    reason = "the data set is empty"
    for i in range(len(dataset)):
        try:
            return dataset[i]
        except OSError as error:
            reason = f"none of its {len(dataset)} items can be read; {error}"
    raise DataError(f"{name}: {reason}")


def _image(item: Any) -> Any:
    return item[0] if isinstance(item, tuple | list) else item


def _labels(dataset: MapDataset, first: Any, name: str) -> NDArray[Any] | None:
    known = _known_labels(dataset)
    if known is not None or not isinstance(first, tuple | list) or len(first) < 2:
        return known
    log.warning("%s: has no targets and no labels; reading all %d items once for their labels", name, len(dataset))
    return np.array([_label(dataset, i) for i in range(len(dataset))])


def _label(dataset: MapDataset, i: int) -> int:
    try:
        return int(dataset[i][1])
    except OSError:
        return 0  # unused: an item that cannot be read is left out


def _known_labels(dataset: Any) -> NDArray[Any] | None:
    """Return the labels that a data set has without reading its items, or None."""
    if isinstance(dataset, torch.utils.data.Subset):
        whole = _known_labels(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices)]
    if isinstance(dataset, torch.utils.data.ConcatDataset):
        parts = [_known_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate(parts)  # type: ignore[arg-type]
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    return None if labels is None or callable(labels) else np.asarray(labels)


def _content(image: Any, name: str) -> NDArray[np.uint8]:
    """Return the encoded bytes [length] or pixels [H, W, 1 or 3] of an item's image."""
    if isinstance(image, bytes | bytearray | memoryview):
        return np.frombuffer(image, np.uint8)
    pixels = image
    if isinstance(image, torch.Tensor):
        pixels = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy(force=True)
    elif hasattr(image, "convert") and hasattr(image, "mode"):
        pixels = _from_pil(image, name)
    if not isinstance(pixels, np.ndarray):
        raise DataError(f"{name}: the image is a {type(image).__name__}; give {_FORMS}")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    wrong = pixels.dtype != np.uint8 or (pixels.ndim, pixels.size and pixels.shape[-1]) not in ((3, 1), (3, 3), (3, 4))
    if wrong and not (pixels.ndim == 1 and pixels.dtype == np.uint8):
        raise DataError(f"{name}: the image is {image.dtype} {list(image.shape)}; give {_FORMS}")
    return np.ascontiguousarray(pixels[..., :3] if pixels.ndim == 3 else pixels)


def _from_pil(image: Any, name: str) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip at 255
        return np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise DataError(f"{name}: a PIL image of mode {image.mode!r} has no known range; convert it to 'L' or 'RGB'")
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
