"""Schedules: values that change over a run, as functions of the step."""

from __future__ import annotations

import math
from typing import Literal


def cosine(step: float, steps: float, start: float, end: float) -> float:
    """Return half a cosine from ``start`` at step 0 to ``end`` at ``steps``, and ``end`` after that."""
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def linear(step: float, steps: float, start: float, end: float) -> float:
    """Return a straight line from ``start`` at step 0 to ``end`` at ``steps``, and ``end`` after that."""
    return end if step >= steps else start + (end - start) * step / steps


def warmup_cosine(step: float, steps: float, warmup: float, peak: float, end: float) -> float:
    """Return a line from 0 to ``peak`` over ``warmup`` steps, then half a cosine down to ``end`` at ``steps``."""
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, steps - warmup, peak, end)


LrScaling = Literal["linear", "sqrt"]


def scaled_lr(lr: float, scaling: LrScaling, batch: int) -> float:
    """Return the peak learning rate for a global batch of images.

    ``linear`` is ``lr batch / 256`` (arXiv 1706.02677), as in most recipes. ``sqrt`` is ``lr sqrt(batch / 1024)``, as
    in DINOv2 (arXiv 2304.07193).
    """
    return lr * batch / 256 if scaling == "linear" else lr * math.sqrt(batch / 1024)
