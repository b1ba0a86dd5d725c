"""Seconds of a step from rooflines: every operator runs at a fraction of the peak that limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .communication import Traffic
from .hardware import Cluster
from .memory import shard_elements
from .trace import Trace
from .update import Update
from .weights import Weight, Zero, trained


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step."""

    operators: float
    """Forward and backward of all micro-steps."""
    update: float
    """Clipping, optimizer and the teacher's average."""
    sent: float
    """All communication, hidden or not."""
    waited: float
    """Communication that is not hidden."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.operators + self.update + self.waited


def step_time(
    weights: Sequence[Weight],
    traced: Trace,
    update: Update,
    sent: Sequence[Traffic],
    zero: Zero,
    cluster: Cluster,
    *,
    precision: str,
    accumulation: int = 1,
) -> StepTime:
    """Return the time of the operators by their rooflines, of the update and of the communication.

    Communication that overlaps with the operators costs only the time by which it exceeds them.
    """
    one = sum(cluster.roofline(work.flops, work.bytes, precision) for work in traced.work)
    operators = one * accumulation
    moved = update.moved * shard_elements(weights, zero) / sum(weight.numel for weight in trained(weights))
    moved += update.teacher_moved / (zero.world if zero.stage == 3 else 1)
    seconds = [(t.hidden, cluster.seconds(t.kind, t.bytes, t.messages)) for t in sent]
    hidden = sum(s for overlaps, s in seconds if overlaps)
    exposed = sum(s for overlaps, s in seconds if not overlaps)
    return StepTime(
        operators, cluster.roofline(0, moved, precision), hidden + exposed, exposed + max(hidden - operators, 0.0)
    )
