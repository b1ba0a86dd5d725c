"""The line of metrics.jsonl that a logged step leaves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ..engine.engine import Engine
from ..methods.base import Objective, Step
from .guard import Finding
from .monitors import spread


@dataclass
class Meter:
    """Images, time and waiting since the last logged step."""

    images: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def figures(self) -> dict[str, float]:
        """Images a second and the fraction of the time spent waiting for data."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        return {"images_per_s": self.images / elapsed, "data_wait": self.waited / elapsed}


def metrics_line(
    engine: Engine, step: Step, objective: Objective, found: Finding, skipped: int, meter: Meter
) -> dict[str, Any]:
    """What a finished and measured step shows, averaged over ranks. Collective.

    Loss and bound are means over the micro-batches too; how the projections are spread is that of the last one.
    """
    bound, rows = objective.bound, objective.projections
    assert bound is not None
    assert rows is not None
    shape = spread(rows)
    spreads = engine.mean(list(shape.values()))
    entropy, reconstruction = found.terms["entropy"], found.terms["reconstruction"]
    return {
        "step": step.index + 1,
        "epoch": (step.index + 1) / step.per_epoch,
        "loss": found.terms["loss"],
        "entropy": entropy,
        "entropy_max": bound.entropy_max,
        "reconstruction": reconstruction,
        "information": entropy - reconstruction,
        "deficit": found.terms["deficit"],
        **dict(zip(shape, spreads, strict=True)),
        **engine.schedules(step),
        "grad_norm": found.grad_norm,
        "skipped_steps": skipped,
        **meter.figures(),
    }
