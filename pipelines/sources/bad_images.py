"""The bad images of a source, their replacements, and the limit on their number."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator

import numpy as np

from ...errors import DataError
from .base import Source

_LEAST_TRIED = 100  # images: a few bad ones among fewer say nothing about the rest
log = logging.getLogger("fasttrain.data")


class BadImages:
    """The bad images of a source. Each is logged once. Threads may share an object.

    Raises DataError if more than the fraction ``most`` is bad. In a random order (``total`` is None), this is the
    fraction of the images tried so far, and of at least 100. If the images come in order, it is the fraction of the
    ``total`` images to try: the images of a lost folder come in a row, but may be few.
    """

    def __init__(self, source: Source, most: float, total: int | None) -> None:
        self.reasons: dict[str, str] = {}  # by the image's name
        self.numbers: set[int] = set()
        self._source, self._most, self._total = source, most, total
        self._tried = np.zeros(len(source), np.bool_)
        self._stride = _stride(len(source))
        self._lock = threading.Lock()

    def candidates(self, i: int) -> Iterator[int]:
        """Yield the numbers to try for image ``i``: itself, then others that are not known to be bad.

        The others are a stride apart. So bad neighbours get different replacements, and the tried images are a fair
        sample of the source: if all of many are bad, the rest need not be tried. Raises DataError after the last one.
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
        """Record that image ``i`` is bad. Raise DataError if there are now too many bad images."""
        name = self._source.describe(i)
        with self._lock:
            if i in self.numbers:
                return
            self.numbers.add(i)
            self._tried[i] = True
            self.reasons[name] = reason
        log.warning("%s: %s; left out from now on", name, reason)
        tried = int(np.count_nonzero(self._tried))
        self._check(len(self.numbers), tried if self._total is None else self._total)

    def _check(self, bad: int, total: int) -> None:
        if bad > self._most * max(total, _LEAST_TRIED):
            most = f"more than the fraction {self._most:g} allowed (max_bad_fraction)"
            raise DataError(f"{self._source.name}: {bad} of {total} images cannot be read, {most}; {self._first()}")

    def _first(self) -> str:
        with self._lock:
            return next((f"{name}: {reason}" for name, reason in self.reasons.items()), "")


def _stride(count: int) -> int:
    """Return a step that visits all of ``count`` numbers: near count / golden ratio, so that steps are far apart."""
    stride = max(1, round(0.618 * count))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride
