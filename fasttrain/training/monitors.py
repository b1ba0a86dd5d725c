"""Monitors of a run: signs of a collapse in the projections, and spikes of the loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..evaluate.spectrum import rankme

_ROWS = 2048
"""Rows of which the spectrum is computed; enough for the projections of every method here."""
_MIN_STD = 0.1
"""Of the standard deviation of a uniform law."""
_MIN_RANK = 1.5
_MIN_NATS = 0.05
_GRACE = 500
"""Steps at the start that are not judged."""
_ALARM = 3
"""Consecutive logged steps after which a collapse is reported."""
_STOP = 10
"""Consecutive logged steps after which a collapse is final."""

_WINDOW = 100
"""Steps that a loss is compared with, and between two reports."""
_MIN_WINDOW = 20
_SPIKE = 6.0
"""Robust standard deviations above the median."""
_MIN_DEVIATION = 0.01
"""Of the median's magnitude. It bounds the deviation from below, however steady the loss has been."""


def spread(projections: Tensor) -> dict[str, float]:
    """Measure how unit-norm rows [N, D] fill their space.

    ``channel_std`` is the mean over channels of the standard deviation, times sqrt(D): 1 for rows uniform on the
    sphere, 0 for equal rows (SimSiam, arXiv 2011.10566, section 4.1). ``effective_rank`` is exp of the entropy of the
    singular values, from 1 to min(N, D) (RankMe, arXiv 2210.02885).
    """
    rows = projections[:: math.ceil(len(projections) / _ROWS)].float()
    std = float(rows.std(dim=0, correction=0).mean()) * math.sqrt(rows.shape[1])
    finite = bool(torch.isfinite(rows).all())
    return {"channel_std": std, "effective_rank": rankme(rows) if finite else math.nan}


class CollapseMonitor:
    """Searches the logged values for a collapse. A sign counts after it has persisted for several logged steps.

    An untrained network looks collapsed too, so the start is not judged: 500 steps or the first epoch, whichever is
    shorter. Every run begins with uniform predictions; those are not judged during the whole first epoch.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.consecutive = 0
        self.sign: str | None = None

    def observe(self, values: Mapping[str, Any]) -> str | None:
        """Return the collapse that a logged step shows for the third time in a row. Report it once."""
        judged = values["step"] > min(_GRACE, self.steps_per_epoch)
        self.sign = collapse_sign(values, started=values["step"] > self.steps_per_epoch) if judged else None
        self.consecutive = self.consecutive + 1 if self.sign else 0
        return self.sign if self.consecutive == _ALARM else None

    @property
    def collapsed(self) -> bool:
        """Whether a sign has persisted."""
        return self.consecutive >= _ALARM

    @property
    def final(self) -> bool:
        """Whether a sign has persisted for 10 logged steps: the run will not recover."""
        return self.consecutive >= _STOP


def collapse_sign(values: Mapping[str, Any], *, started: bool = True) -> str | None:
    """Return the kind of collapse that one logged step looks like, if any.

    Uniform predictions are a collapse only once training has ``started``. Values that a method does not log are not
    judged.
    """
    std, rank = values.get("channel_std"), values.get("effective_rank")
    if std is not None and std < _MIN_STD:
        return f"all projections are nearly one point (channel_std {std:.3f})"
    if rank is not None and rank < _MIN_RANK:
        return f"all projections lie on one line (effective_rank {rank:.2f})"
    information, deficit = values.get("information"), values.get("deficit")
    if information is None or deficit is None or abs(information) >= _MIN_NATS:
        return None
    # One prototype, or the same mixture of prototypes, for all images: entropy and reconstruction are equal.
    if deficit >= _MIN_NATS:
        return f"all images have the same assignment (entropy {values['entropy']:.3f}, {deficit:.3f} below uniform)"
    return "all assignments are uniform (the entropy is at its ceiling, nothing is reconstructed)" if started else None


@dataclass(frozen=True)
class Spike:
    """A loss, the median of the ``steps`` before it, and its distance above it in robust standard deviations."""

    loss: float
    median: float
    deviations: float
    steps: int

    def __str__(self) -> str:
        return (
            f"the loss jumped to {self.loss:.4g}, {self.deviations:.0f} robust standard deviations above "
            f"{self.median:.4g}, the median of the last {self.steps} steps"
        )


def describe_spike(spike: Spike, step: int, terms: Mapping[str, float], logged: Mapping[str, Any]) -> str:
    """Return one line: the spike with entropy and reconstruction of the step, or of the last logged step."""
    values, origin = (terms, "") if "entropy" in terms else (logged, f" (of step {logged.get('step')})")
    named = [f"{name} {values[name]:.3f}" for name in ("entropy", "reconstruction") if values.get(name) is not None]
    return f"step {step}: {spike}" + (f"; {', '.join(named)}{origin}" if named else "")


class SpikeMonitor:
    """Compares each step's loss with the last 100.

    ``z = (loss - median) / max(1.4826 MAD, 0.01 |median|)``, with MAD the median absolute deviation. A spike has z > 6,
    once there are 20 steps to compare with. At most one spike is reported per 100 steps.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._quiet = 0

    def observe(self, loss: float) -> Spike | None:
        """Return the spike that a step's finite loss is, unless one was reported recently."""
        spike = self._compare(loss) if len(self._losses) >= _MIN_WINDOW and not self._quiet else None
        self._losses.append(loss)
        self._quiet = _WINDOW if spike else max(self._quiet - 1, 0)
        return spike

    def _compare(self, loss: float) -> Spike | None:
        center = median(self._losses)
        scale = max(1.4826 * median(abs(x - center) for x in self._losses), _MIN_DEVIATION * abs(center))
        deviations = (loss - center) / scale if scale else math.inf if loss > center else 0.0
        return Spike(loss, center, deviations, len(self._losses)) if deviations > _SPIKE else None
