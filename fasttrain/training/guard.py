"""The numerics guard: a step whose loss or gradient is not finite is skipped on every rank.

The guard runs after backward, when the gradient is averaged, and before DeepSpeed's step. One reduction of a few
numbers gives every rank the same result: the loss and its logs, the gradient's norm, pending signals, and whether the
data of a rank has failed. The host waits for the device only there.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.signals import Signals, stop_signal
from ..engine.engine import Engine
from ..engine.shards import gradients
from ..errors import Diverged
from ..losses.base import gather_detached
from ..methods import Method, Objective, Step
from ..pipelines import Batch


@dataclass(frozen=True)
class Finding:
    """The result of a step's reduction, the same on every rank."""

    terms: dict[str, float]
    """Means over ranks and micro-batches of the loss, the method's logs and, if measured, the bound's terms."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    fault: str | None
    """The reason why the step was skipped: the loss or gradient that is not finite."""
    stop: signal.Signals | None
    """The signal that any rank received."""
    data_failed: bool = False
    """Whether any rank had no batch, so that the step was skipped."""


class Guard:
    """Runs an engine's steps and takes back each step that is not finite.

    A skipped step leaves weights, teacher, optimizer and every buffer unchanged, to the last bit. Data and schedules
    continue: the batch is not seen again.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self.skipped = 0
        """Skipped steps of the whole run."""
        self.consecutive = 0
        """Skipped steps since the last good one."""
        self._undo = Undo(engine.method)
        self._last_good: dict[str, float] = {}

    def reset(self, skipped: int) -> None:
        """Continue from a checkpoint that counts ``skipped`` steps."""
        self.skipped, self.consecutive = skipped, 0

    def step(
        self, batches: Iterable[Batch], step: Step, signals: Signals, data_failed: Callable[[], bool] = lambda: False
    ) -> tuple[Objective, Finding]:
        """Make one step from its micro-batches. Collective.

        ``signals`` count until the end of backward. ``data_failed`` is asked there, whether this rank has no batches.
        """
        engine, sums, count = self.engine, dict[str, Tensor](), 0
        self._undo.begin()
        for batch in batches:
            if count:
                engine.update(step)  # hands over the previous micro-batch
            self._undo.keep_rows(batch.indices)
            objective = engine.micro_step(batch, step, count)
            terms = named_terms(objective)
            if count and terms.keys() != sums.keys():
                raise ValueError(f"Objective.logs: must have the same names in every micro-batch, got {[*terms]}")
            sums = {name: sums[name] + value.double() if count else value.double() for name, value in terms.items()}
            count += 1
        terms = {name: total / count for name, total in sums.items()}
        finding = self._reduce(step.index + 1, terms, signals, failed=data_failed())
        engine.update(step, skip=finding.fault is not None, grad_norm=finding.grad_norm)
        if finding.fault is not None:
            self._undo.restore()
        self._count(finding, step)
        return objective, finding

    def _reduce(self, step: int, terms: Mapping[str, Tensor], signals: Signals, *, failed: bool) -> Finding:
        engine = self.engine
        groups = gradients(engine.optimizer, engine.stage)
        squares = torch.stack([_sum_of_squares(tensors, engine.device) for _, tensors in groups])
        if engine.stage == 0:
            squares /= engine.world.size  # every rank holds the whole gradient
        sums = _all_reduce(
            {
                "terms": torch.stack(list(terms.values())),
                "squares": squares,
                "signals": _on_device([*signals.counts, failed], engine.device),
            },
            engine.world.size,
        )
        means = {name: value / engine.world.size for name, value in zip(terms, sums["terms"], strict=True)}
        names = [name for (name, _), square in zip(groups, sums["squares"], strict=True) if not math.isfinite(square)]
        norm = math.sqrt(sum(sums["squares"])) / engine.loss_scale
        *counts, failures = sums["signals"]
        reason = f"a rank has no images at step {step}" if failures else fault(step, means, names)
        return Finding(means, norm, reason, stop_signal(counts), bool(failures))

    def _count(self, finding: Finding, step: Step) -> None:
        if finding.fault is None:
            self.consecutive = 0
            self._last_good |= {**finding.terms, "gradient norm": finding.grad_norm, "step": step.index + 1}
            return
        self.skipped += 1
        # fp16 searches its scale: a gradient that overflows is no fault while the scale can still be lowered.
        if not math.isfinite(finding.terms["loss"]) or self.engine.loss_scale <= 1:
            self.consecutive += 1

    def judge(self, finding: Finding) -> None:
        """Raise :class:`Diverged`, with the last finite values, after too many consecutive skipped steps."""
        if finding.fault is None or self.consecutive < self.limit:
            return
        values = [f"{name} {value:.4g}" for name, value in self._last_good.items() if name != "step"]
        before = f"step {self._last_good['step']:.0f} had {', '.join(values)}" if values else "no step was finite"
        repeated = f" {self.consecutive} consecutive steps" if self.consecutive > 1 else ""
        raise Diverged(f"{finding.fault}; skipped{repeated}; {before}. Lower --lr or set --clip_grad.")


def named_terms(objective: Objective) -> dict[str, Tensor]:
    """Return, without gradient, the loss, the method's logs and, if the bound was measured, its terms."""
    terms = {"loss": objective.loss.detach(), **objective.logs}
    if objective.bound is not None:
        bound = objective.bound
        terms |= {"entropy": bound.entropy, "reconstruction": bound.reconstruction, "deficit": bound.deficit}
    return terms


def fault(step: int, terms: Mapping[str, float], groups: Sequence[str]) -> str | None:
    """Return which of a step's loss or gradient groups is not finite, with the terms that cause it; None if all are."""
    if not math.isfinite(terms["loss"]):
        causes = [f"{n} {v}" for n, v in terms.items() if n not in ("loss", "deficit") and not math.isfinite(v)]
        return f"the loss is {terms['loss']} at step {step}" + (f" ({', '.join(causes)})" if causes else "")
    if groups:
        return f"the gradient of the {' and of the '.join(groups)} is not finite at step {step}"
    return None


def _all_reduce(vectors: Mapping[str, Tensor], world_size: int) -> dict[str, list[float]]:
    """Return the sums over ranks of named vectors, by one reduction and one copy to the host."""
    packed = torch.cat([vector.double() for vector in vectors.values()])
    if world_size > 1:
        dist.all_reduce(packed)
    parts = torch.split(packed.cpu(), [len(vector) for vector in vectors.values()])
    return {name: part.tolist() for name, part in zip(vectors, parts, strict=True)}


def _on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Return the values in fp64. The host does not wait for the device."""
    tensor = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def _sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of this rank's part of a group's gradient, in fp64."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(list(tensors))).double().square().sum().to(device)  # it may be offloaded


class Undo:
    """A copy of every buffer of a method (queues, centres, BatchNorm's statistics) from before a step.

    A memory of all images (``Method.image_memories``) may be larger than the network. A step writes only the rows of
    its batch, so only those are copied.
    """

    def __init__(self, method: Method) -> None:
        self._group = method.group
        self._memories = [(method.get_buffer(name), dim) for name, dim in method.image_memories.items()]
        self._buffers = [b for name, b in method.named_buffers() if name not in method.image_memories]
        self._copies = [torch.empty_like(buffer) for buffer in self._buffers]
        self._rows: list[tuple[Tensor, list[Tensor]]] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the buffers. Call it before a step's first micro-step."""
        self._rows = []
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    @torch.no_grad()
    def keep_rows(self, indices: Tensor) -> None:
        """Copy the rows of the images ``indices`` [B] of all ranks. Call it before every micro-step."""
        if self._memories:
            gathered = gather_detached(indices.to(self._memories[0][0].device), self._group)
            self._rows.append((gathered, [memory.index_select(dim, gathered) for memory, dim in self._memories]))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the state at :meth:`begin`."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._copies)
        for indices, rows in reversed(self._rows):
            for (memory, dim), copies in zip(self._memories, rows, strict=True):
                memory.index_copy_(dim, indices, copies)
