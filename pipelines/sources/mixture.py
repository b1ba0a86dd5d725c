"""Several sources as one, with weights: the images of all, and the order of an epoch.

An epoch has as many images as the sources have together, N. Without weights, each image comes once. With weights, a
source of weight w has its share, w / (sum of the weights) of N. It runs through its own images in random order, again
and again, and continues in the next epoch where it stopped. So its images are used equally often. The shares are spread
evenly over the epoch, so that every batch has nearly the weights' mixture. All this is a function of seed and epoch.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, DataError
from ..views.draw import epoch_order, uniforms
from .base import Source
from .decode import pnm
from .labels import renumbered
from .listing import Listing, digest_of, listing_of
from .scan import LeftOut

_WEIGHTED = 0x6D6978  # "mix" in ASCII: makes the order of a weighted epoch independent of other draws
Indices = NDArray[np.int64]


class Order(NamedTuple):
    """The images of an epoch, in order. ``rounds`` counts how often an image came before in this epoch."""

    images: Indices
    rounds: Indices


class MixtureSource:
    """The images of several sources, one source after the other.

    Labels are merged by the names of the classes: the first source's, then the new ones of the next. A source
    without names has its class numbers as names. If one source has no labels, the mixture has none. ``classes`` fixes
    the names, which held-out images need. ``names`` replace the sources' own names. Files and
    arrays may be mixed. Raises ConfigError for invalid ``weights``,
    and DataError if a class is not in ``classes``.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] = (),
        classes: Sequence[str] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.sources = tuple(sources)
        self._names = tuple(names) or tuple(source.name for source in sources)
        self.name = " + ".join(self._names)
        self._ends = np.cumsum([len(source) for source in sources])
        self.encoded = any(source.encoded for source in sources)
        self.channels = max(source.channels for source in sources)
        self.quotas = quotas([len(source) for source in sources], weights, self._names)
        """Images of each source in an epoch."""
        named = zip(self._names, sources, strict=True)
        self._unlabelled = ", ".join(name for name, source in named if source.labels is None)
        self.labels: Indices | None = None
        self.classes: tuple[str, ...] = ()
        if not self._unlabelled and (classes is None or classes):
            numbered = [_class_names(source) for source in sources]
            self.classes = tuple(classes or dict.fromkeys(itertools.chain(*numbered)))
            self.labels = np.concatenate(
                [
                    renumbered(source.labels, own, self.classes, source.name)
                    for source, own in zip(sources, numbered, strict=True)
                    if source.labels is not None
                ]
            )

    @cached_property
    def listing(self) -> Listing:
        """The findings about all sources."""
        parts = [listing_of(source) for source in self.sources]
        left_out = LeftOut()
        for part in parts:
            left_out.add(LeftOut(Counter(part.left_out), dict(part.special)))
        sizes = [len(source) for source in self.sources]
        epoch = [f", {quota:,} in an epoch" if self.quotas != sizes else "" for quota in self.quotas]
        shares = [f"{name}: {size:,} images{q}" for name, size, q in zip(self._names, sizes, epoch, strict=True)]
        origins = ", ".join(dict.fromkeys(part.labels_from for part in parts if part.labels_from))
        return Listing(
            len(self),
            self.classes,
            labels_from="" if self.labels is None else f"{origins}, merged by name",
            unlabelled=f"{self._unlabelled} has none" if self._unlabelled else "",
            left_out=left_out.extensions,
            special=left_out.special,
            split_like=tuple(name for part in parts for name in part.split_like),
            links_back=tuple(link for part in parts for link in part.links_back),
            notes=(*shares, *(note for part in parts for note in part.notes)),
            digest=digest_of(*(part.digest for part in parts), map(str, self.quotas)),
        )

    def order(self, seed: int, epoch: int) -> Order:
        """Return the order of an epoch. It is the same on every rank and after every restart."""
        sizes = np.diff(self._ends, prepend=0).tolist()
        if self.quotas == sizes:
            images = epoch_order(seed, epoch, len(self))
            return Order(images, np.zeros_like(images))
        seed ^= _WEIGHTED
        parts = []
        for start, size, quota in zip((self._ends - sizes).tolist(), sizes, self.quotas, strict=True):
            begin, end = epoch * quota, (epoch + 1) * quota
            passes = range(begin // size, -(-end // size))
            own = np.arange(start, start + size)
            shuffled = [own[np.argsort(uniforms(seed, number, own, 1)[:, 0], kind="stable")] for number in passes]
            skipped = begin - passes[0] * size
            images = np.concatenate(shuffled)[skipped : skipped + quota]
            rounds = np.repeat(np.arange(len(passes)), size)[skipped : skipped + quota]
            late = uniforms(seed ^ _WEIGHTED << 32, epoch, images + rounds * len(self), 1)[:, 0]
            parts.append((images, rounds, (np.arange(quota) + late) / quota))
        images, rounds, times = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(times, kind="stable")
        return Order(images[order], rounds[order])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int) -> NDArray[np.uint8]:
        """Return the bytes or pixels of image ``i``. Raise OSError if it cannot be read."""
        source, number = self._locate(i)
        data = source.read(number)
        return data if source.encoded or not self.encoded else _as_file(data, source)

    def describe(self, i: int) -> str:
        """Return the name of image ``i`` in its source."""
        source, number = self._locate(i)
        return source.describe(number)

    def stamp(self, i: int) -> str:
        """Return the stamp of image ``i`` in its source."""
        source, number = self._locate(i)
        return source.stamp(number)

    def _locate(self, i: int) -> tuple[Source, int]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self.sources[k], int(i) - int(self._ends[k - 1] if k else 0)


def quotas(sizes: Sequence[int], weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """Return the images of each source in an epoch: the sizes without weights, else by the largest remainders.

    Raises ConfigError for invalid weights, and if a source has no image in an epoch.
    """
    check_weights(weights, len(sizes))
    if not weights:
        return list(sizes)
    shares, images = [weight / max(weights) for weight in weights], sum(sizes)  # their sum cannot overflow
    exact = [share / math.fsum(shares) * images for share in shares]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: images - sum(counts)]:
        counts[k] += 1
    for name, weight, count in zip(names, weights, counts, strict=True):
        if count < 1:
            raise ConfigError(
                f"--data_weights: leaves no image of {name} in an epoch of {images:,}, got {weight:g}. Raise it."
            )
    return counts


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raise ConfigError unless there is no weight, or a finite one above 0 for each of ``count`` sources."""
    if weights and len(weights) != count:
        raise ConfigError(
            f"--data_weights: must be one number per source, {count}, got {len(weights)}. "
            "Give as many weights as data paths."
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"--data_weights: must be finite numbers above 0, got {weight:g}.")


def _class_names(source: Source) -> tuple[str, ...]:
    """Return the names of a source's classes, or its class numbers as names."""
    if source.labels is None:
        return ()
    most = int(source.labels.max(initial=-1)) + 1
    return (*source.classes, *(str(k) for k in range(len(source.classes), most)))


def _as_file(pixels: NDArray[np.uint8], source: Source) -> NDArray[np.uint8]:
    """Return pixels as an uncompressed image file, for a mixture with files."""
    channels = pixels.shape[-1]
    if channels not in (1, 3) or pixels.dtype != np.uint8:
        raise DataError(f"{source.name}: {pixels.dtype} pixels with {channels} channels do not mix with image files")
    return pnm(pixels)
