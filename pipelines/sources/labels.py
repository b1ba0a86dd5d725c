"""Class numbers from the labels of data sets: numbers, names, or a reason why they are no classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ...errors import DataError
from .base import class_numbers

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "picture", "photo", "pixel_values", "pixels", "input", "x")
_FEW = 100  # images; among more, names that are all different are paths or captions, not classes
LABEL_NAMES = ("label", "labels", "target", "targets", "class", "cls", "category", "y")


@dataclass(frozen=True)
class Labels:
    """The class number of each image [N] and the names of the classes, or the reason why there are none."""

    numbers: NDArray[np.int64] | None = None
    names: tuple[str, ...] = ()
    reason: str = ""


def given_labels(labels: ArrayLike, count: int, name: str) -> Labels:
    """Return labels that the user passed. Raise DataError if they are not a number or a name per image."""
    values = labels_of_values(labels, count)
    if values.reason:
        return Labels(class_numbers(labels, count, name))
    return Labels(class_numbers(values.numbers, count, name), values.names) if values.numbers is not None else values


def labels_of_values(values: Any, count: int) -> Labels:
    """Return class numbers from numbers or names [count], or the reason why they are no labels."""
    if isinstance(values, torch.Tensor):
        values = values.numpy(force=True)
    if not isinstance(values, np.ndarray):
        values = list(values)
        reason = next((reason for value in values if (reason := no_label(value))), "")
        if reason:
            return Labels(reason=reason)
        values = np.array([_plain(value) for value in values])
    if values.shape == (count, 1):
        values = values[:, 0]
    if values.shape != (count,):
        return Labels(reason=f"its targets have the shape {list(values.shape)}")
    if values.dtype.kind in "US" or (values.dtype.kind == "O" and all(isinstance(v, str) for v in values)):
        names, numbers = np.unique(values.astype(str), return_inverse=True)
        if len(names) == count > _FEW:
            return Labels(reason=f"each image has a name of its own as target, such as {names[0]}")
        return Labels(numbers.astype(np.int64), tuple(map(str, names)))
    if values.dtype.kind not in "biu":
        return Labels(reason=f"its targets are {values.dtype}")
    return Labels(values.astype(np.int64))


def no_label(value: Any) -> str:
    """Return why a target is no class, or an empty text."""
    if isinstance(value, str | bool | int | np.integer | np.bool_):
        return ""
    if isinstance(value, np.ndarray | torch.Tensor):
        array = value.numpy(force=True) if isinstance(value, torch.Tensor) else value
        if array.size == 1 and array.dtype.kind in "biu":
            return ""
        return f"a target is an array {array.dtype} {list(array.shape)}"
    kinds = {dict: "a dict, such as boxes", type(None): "None", list: "a list", tuple: "a tuple", float: "a fraction"}
    return f"a target is {kinds.get(type(value), type(value).__name__)}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else int(value.item() if hasattr(value, "item") else value)


def renumbered(
    labels: NDArray[np.int64], names: Sequence[str], classes: Sequence[str], source: str
) -> NDArray[np.int64]:
    """Return labels that count in ``names`` as labels that count in ``classes``. Raise DataError for a missing one."""
    positions = {name: k for k, name in enumerate(classes)}
    for k in np.unique(labels).tolist():
        if names[k] not in positions:
            raise DataError(f"{source}: class {names[k]!r} is not among the training classes; leave its images out")
    return np.array([positions.get(name, -1) for name in names], np.int64)[labels]
