"""Signs of a collapse in the projections, and how long they have been there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..evaluate.spectrum import rankme

_ROWS = 2048  # enough for the spectrum of any projection here
_SPREAD = 0.1  # of a uniform law's standard deviation
_RANK = 1.5
_NATS = 0.05
_GRACE = 500  # steps
_ALARM = 3  # logged steps in a row
_STOP = 10


def spread(projections: Tensor) -> dict[str, float]:
    """How the unit-norm rows [N, D] fill their space.

    ``channel_std``: mean over channels of the standard deviation, times sqrt(D): 1 for rows uniform on the sphere, 0
    for equal rows (SimSiam, arXiv 2011.10566, section 4.1). ``effective_rank``: exp of the entropy of the singular
    values, 1 to min(N, D) (RankMe, arXiv 2210.02885).
    """
    rows = projections[:: math.ceil(len(projections) / _ROWS)].float()
    std = float(rows.std(dim=0, correction=0).mean()) * math.sqrt(rows.shape[1])
    finite = bool(torch.isfinite(rows).all())
    return {"channel_std": std, "effective_rank": rankme(rows) if finite else math.nan}


class Watch:
    """Looks for a collapse in the logged values; a sign counts once it has stayed for some logged steps.

    A network that has learnt nothing yet looks collapsed too, so the start is not judged: 500 steps or the first epoch,
    whichever is shorter, and for uniform predictions, with which every run begins, the whole first epoch.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.seen = 0
        self.what: str | None = None

    def look(self, values: Mapping[str, Any]) -> str | None:
        """The collapse that a logged step shows for the third time in a row; told once, not at every step."""
        judged = values["step"] > min(_GRACE, self.steps_per_epoch)
        self.what = sign(values, started=values["step"] > self.steps_per_epoch) if judged else None
        self.seen = self.seen + 1 if self.what else 0
        return self.what if self.seen == _ALARM else None

    @property
    def collapsed(self) -> bool:
        """Whether a sign is there and has stayed."""
        return self.seen >= _ALARM

    @property
    def hopeless(self) -> bool:
        """Whether it has stayed so long that nothing will change."""
        return self.seen >= _STOP


def sign(values: Mapping[str, Any], *, started: bool = True) -> str | None:
    """What kind of collapse one logged step looks like, if any; uniform predictions are one once it has ``started``."""
    if values["channel_std"] < _SPREAD:
        return f"all projections are nearly one point (channel_std {values['channel_std']:.3f})"
    if values["effective_rank"] < _RANK:
        return f"all projections lie on one line (effective_rank {values['effective_rank']:.2f})"
    if abs(values["information"]) >= _NATS:
        return None
    # One prototype, or every prototype alike, for all images: entropy and reconstruction are then the same.
    if values["deficit"] >= _NATS:
        return f"all images are assigned alike (entropy {values['entropy']:.3f}, {values['deficit']:.3f} below uniform)"
    return "all assignments are uniform (entropy at its ceiling, nothing reconstructed)" if started else None
