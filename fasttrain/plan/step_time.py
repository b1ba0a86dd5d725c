"""Seconds of a step from rooflines: what it would take if every operator ran at a fraction of what binds it."""

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
    """Everything that is sent, hidden or not."""
    waited: float
    """What of it the step waits for."""

    @property
    def total(self) -> float:
        """All of the step."""
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
    """Operator by operator the larger of its products' time and its memory's; then the update, and what is sent.

    What runs beside the products is waited for as far as it takes longer than they do.
    """
    one = sum(cluster.roofline(work.flops, work.bytes, precision) for work in traced.work)
    operators = one * accumulation
    moved = update.moved * shard_elements(weights, zero) / sum(weight.numel for weight in trained(weights))
    moved += update.teacher_moved / (zero.world if zero.stage == 3 else 1)
    seconds = [(t.hidden, cluster.seconds(t.kind, t.bytes, t.messages)) for t in sent]
    hidden = sum(s for beside, s in seconds if beside)
    shown = sum(s for beside, s in seconds if not beside)
    return StepTime(
        operators, cluster.roofline(0, moved, precision), hidden + shown, shown + max(hidden - operators, 0.0)
    )
