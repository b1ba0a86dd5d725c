"""Loss spikes: a loss far above what it has been of late."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

_WINDOW = 100  # steps
_LEAST = 20
_FAR = 6.0  # robust standard deviations
_FLOOR = 0.01  # of the median's size, below which a deviation is none, however steady the loss has been


@dataclass(frozen=True)
class Spike:
    """A loss, the median of the ``steps`` before it, and how many robust standard deviations it lies above."""

    loss: float
    usual: float
    deviations: float
    steps: int

    def __str__(self) -> str:
        return (
            f"the loss jumped to {self.loss:.4g}, {self.deviations:.0f} robust standard deviations above "
            f"{self.usual:.4g}, the median of the last {self.steps} steps"
        )


def told(spike: Spike, step: int, terms: Mapping[str, float], logged: Mapping[str, Any]) -> str:
    """One line: the spike with the step's entropy and reconstruction, or else those of the last logged step."""
    values, when = (terms, "") if "entropy" in terms else (logged, f" (of step {logged.get('step')})")
    named = [f"{name} {values[name]:.3f}" for name in ("entropy", "reconstruction") if values.get(name) is not None]
    return f"step {step}: {spike}" + (f"; {', '.join(named)}{when}" if named else "")


class Spikes:
    """Compares each step's loss with the last 100.

    ``z = (loss - median) / max(1.4826 MAD, 0.01 |median|)``, MAD the median absolute deviation; a spike is z > 6, once
    there are 20 steps to compare with. Told once in 100 steps.
    """

    def __init__(self) -> None:
        self._past: deque[float] = deque(maxlen=_WINDOW)
        self._quiet = 0

    def look(self, loss: float) -> Spike | None:
        """The spike that a step's finite loss is, if it is one and none was told of late."""
        spike = self._compare(loss) if len(self._past) >= _LEAST and not self._quiet else None
        self._past.append(loss)
        self._quiet = _WINDOW if spike else max(self._quiet - 1, 0)
        return spike

    def _compare(self, loss: float) -> Spike | None:
        usual = median(self._past)
        scale = max(1.4826 * median(abs(x - usual) for x in self._past), _FLOOR * abs(usual))
        deviations = (loss - usual) / scale if scale else math.inf if loss > usual else 0.0
        return Spike(loss, usual, deviations, len(self._past)) if deviations > _FAR else None
