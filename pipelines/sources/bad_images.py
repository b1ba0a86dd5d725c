"""Which images of a source have proved bad, what is read in their place, and whether they are too many."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator

import numpy as np

from ...errors import DataError
from .base import Source

_LEAST_TRIED = 100  # images: of fewer, a few bad ones say nothing about the rest
log = logging.getLogger("fasttrain.data")


class BadImages:
    """The bad images of a source, each named once in the log. Threads may share it.

    Where more than ``most``, a fraction, are bad, DataError is raised: of the images tried so far if their order is
    random, but of at least 100; of all ``whole`` that will be tried if they come in order, for then bad ones may come
    in a row, as those of a lost folder do, and yet be few.
    """

    def __init__(self, source: Source, most: float, whole: int | None) -> None:
        self.reasons: dict[str, str] = {}  # by the image's name
        self.numbers: set[int] = set()
        self._source, self._most, self._whole = source, most, whole
        self._tried = np.zeros(len(source), np.bool_)
        self._stride = _stride(len(source))
        self._lock = threading.Lock()

    def candidates(self, i: int) -> Iterator[int]:
        """Numbers to try for image ``i``: itself, then others, not yet known to be bad. DataError at their end.

        The others lie a stride apart. So bad neighbours are not all replaced by the same image, and those tried are a
        fair sample of the source: where all of many are bad, the rest need not be tried.
        """
        count = len(self._source)
        for tries in range(count):
            self._check(tries, tries)
            j = (i + tries * self._stride) % count
            if j not in self.numbers:
                self._tried[j] = True
                yield j
        raise DataError(f"{self._source.name}: none of its {count} images can be read; {self._first()}")

    def add(self, i: int, reason: str) -> None:
        """Note that image ``i`` is bad, unless that is known; DataError where they are too many now."""
        name = self._source.describe(i)
        with self._lock:
            if i in self.numbers:
                return
            self.numbers.add(i)
            self._tried[i] = True
            self.reasons[name] = reason
        log.warning("%s: %s; left out from now on", name, reason)
        self._check(len(self.numbers), int(np.count_nonzero(self._tried)) if self._whole is None else self._whole)

    def _check(self, bad: int, total: int) -> None:
        if bad > self._most * max(total, _LEAST_TRIED):
            most = f"more than the fraction {self._most:g} allowed (max_bad_fraction)"
            raise DataError(f"{self._source.name}: {bad} of {total} images cannot be read, {most}; {self._first()}")

    def _first(self) -> str:
        with self._lock:
            return next((f"{name}: {reason}" for name, reason in self.reasons.items()), "")


def _stride(count: int) -> int:
    """A step that visits all of ``count`` numbers, about the golden ratio of them, so that steps fall far apart."""
    stride = max(1, round(0.618 * count))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride
