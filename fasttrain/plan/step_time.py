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
    """Forward and backward of all micro-steps on the GPU."""
    update: float
    """Clipping, optimizer and the teacher's average on the GPU."""
    host: float
    """Calls of all operators by the host, which the GPU waits for if they take longer."""
    sent: float
    """All communication, hidden or not."""
    waited: float
    """Communication that is not hidden."""

    @property
    def total(self) -> float:
        """The whole step."""
        return max(self.operators + self.update, self.host) + self.waited


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

    The host calls operators while the GPU computes, so the longer of the two counts. Communication that overlaps with
    the operators costs only the time by which it exceeds them.
    """
    one = sum(cluster.roofline(work.flops, work.bytes, precision) for work in traced.work)
    operators = one * accumulation
    own = trained(weights)
    moved = update.moved * shard_elements(weights, zero) / sum(weight.numel for weight in own)
    moved += update.teacher_moved / (zero.world if zero.stage == 3 else 1)
    seconds = [(t.hidden, cluster.seconds(t.kind, t.bytes, t.messages)) for t in sent]
    hidden = sum(s for overlaps, s in seconds if overlaps)
    exposed = sum(s for overlaps, s in seconds if not overlaps)
    return StepTime(
        operators,
        cluster.roofline(0, moved, precision),
        host=_host(traced.calls * accumulation, len(traced.uses) * accumulation, len(own), zero, cluster),
        sent=hidden + exposed,
        waited=exposed + max(hidden - operators, 0.0),
    )


def _host(calls: int, modules: int, tensors: int, zero: Zero, cluster: Cluster) -> float:
    hooks = cluster.host_zero3 * modules if zero.stage == 3 else 0.0
    return cluster.host * calls + cluster.host_update * tensors + hooks
