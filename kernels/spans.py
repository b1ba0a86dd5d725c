"""Equal parts of a range, for tiles on the CPU."""

from __future__ import annotations


def equal_spans(length: int, most: int) -> list[slice]:
    """Return equal parts of at most ``most`` numbers. A last part of a few would cost the calls of a whole tile."""
    parts = -(-length // most)
    step = -(-length // parts)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
