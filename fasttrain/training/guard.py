"""The numerics guard: a step whose loss or gradient is not finite is made on no rank; too many in a row end the run.

Backward is through and the gradient averaged when the guard looks, before DeepSpeed's step. One reduction of a few
numbers tells every rank the same: the loss and its terms, the gradient's norm, and who was asked to stop.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.signals import Signals, stop_signal
from ..engine.engine import Engine
from ..engine.shards import gradients
from ..errors import Diverged
from ..methods.base import Objective, Step
from ..pipelines import Batch
from .undo import Undo

_TERMS = ("loss", "entropy", "reconstruction", "deficit")


@dataclass(frozen=True)
class Finding:
    """What a step's reduction found, the same on every rank."""

    terms: dict[str, float]
    """Means over ranks and micro-batches of the loss and, where it or the measurement has them, of its terms."""
    grad_norm: float
    """Norm of the whole gradient, before it is clipped."""
    fault: str | None
    """What is not finite; such a step is skipped."""
    stop: signal.Signals | None
    """The signal that any rank has had."""


class Guard:
    """Makes an engine's steps. ``skipped`` counts those it took back, ``row`` those since the last good one.

    A skipped step leaves weights, teacher, optimizer and every buffer as they were, to the last bit. Data and schedules
    go on: the batch is not seen again.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self.skipped = self.row = 0
        self._undo = Undo(engine.method)
        self._good: dict[str, float] = {}
        """The last finite values of everything, for a diagnosis."""

    def step(self, batches: Iterable[Batch], step: Step, signals: Signals) -> tuple[Objective, Finding]:
        """One step on its micro-batches; ``signals`` are those of this rank, up to the end of backward. Collective."""
        engine, sums, count = self.engine, torch.zeros(len(_TERMS), dtype=torch.float64, device=self.engine.device), 0
        self._undo.begin()
        for batch in batches:
            if count:
                engine.update(step)  # hands over the micro-batch before
            self._undo.keep_rows(batch.indices)
            objective = engine.micro_step(batch, step, count)
            terms = named_terms(objective)
            sums += torch.stack([terms[n].double() if n in terms else sums.new_zeros(()) for n in _TERMS])
            count += 1
        there = {name: i for i, name in enumerate(_TERMS) if name in terms}
        found = self._look(step.index + 1, there, sums / count, signals)
        engine.update(step, skip=found.fault is not None)
        if found.fault is not None:
            self._undo.restore()
        self._count(found, step)
        return objective, found

    def _look(self, step: int, there: dict[str, int], sums: Tensor, signals: Signals) -> Finding:
        engine = self.engine
        groups = gradients(engine.optimizer, engine.stage)
        squares = torch.stack([_square(held, sums) for _, held in groups])
        if engine.stage == 0:
            squares /= engine.world.size  # all ranks hold all of it
        values = torch.cat([sums, squares, torch.tensor(signals.counts, dtype=torch.float64).to(sums.device)])
        if engine.world.size > 1:
            dist.all_reduce(values)
        numbers = values.tolist()
        means = {name: numbers[i] / engine.world.size for name, i in there.items()}
        by_group = numbers[len(_TERMS) : len(_TERMS) + len(groups)]
        stop = stop_signal(numbers[len(_TERMS) + len(groups) :])
        names = [name for (name, _), square in zip(groups, by_group, strict=True) if not math.isfinite(square)]
        return Finding(means, math.sqrt(sum(by_group)) / engine.loss_scale, fault(step, means, names), stop)

    def _count(self, found: Finding, step: Step) -> None:
        if found.fault is None:
            self.row = 0
            self._good |= {**found.terms, "gradient norm": found.grad_norm, "step": step.index + 1}
            return
        self.skipped += 1
        # fp16 finds its scale by trying: a gradient that is too large then is no fault until it cannot be scaled down.
        if not math.isfinite(found.terms["loss"]) or self.engine.loss_scale <= 1:
            self.row += 1

    def judge(self, found: Finding) -> None:
        """Raise :class:`Diverged`, with the last finite values of all that was watched, after too many in a row."""
        if found.fault is None or self.row < self.limit:
            return
        shown = [f"{name} {value:.4g}" for name, value in self._good.items() if name != "step"]
        before = f"step {self._good['step']:.0f} still had {', '.join(shown)}" if shown else "no step was good"
        row = f" {self.row} steps in a row" if self.row > 1 else ""
        raise Diverged(f"{found.fault}; skipped{row}; {before}; lower --lr or set --clip_grad")


def named_terms(objective: Objective) -> dict[str, Tensor]:
    """The loss by its name and, where they are known, the two terms of the bound and the deficit, without gradient."""
    terms = {"loss": objective.loss.detach(), **objective.terms}
    if objective.bound is not None:
        bound = objective.bound
        terms |= {"entropy": bound.entropy, "reconstruction": bound.reconstruction, "deficit": bound.deficit}
    return terms


def fault(step: int, terms: dict[str, float], groups: Sequence[str]) -> str | None:
    """What is not finite of a step's loss, with the terms that it comes from, or else of its gradient's groups."""
    if not math.isfinite(terms["loss"]):
        causes = [f"{n} {v}" for n, v in terms.items() if n not in ("loss", "deficit") and not math.isfinite(v)]
        return f"the loss is {terms['loss']} at step {step}" + (f" ({', '.join(causes)})" if causes else "")
    if groups:
        return f"the gradient of the {' and of the '.join(groups)} is not finite at step {step}"
    return None


def _square(gradient: list[Tensor], like: Tensor) -> Tensor:
    """Sum of squares of a group's gradient, as far as this rank holds it, in fp64."""
    if not gradient:
        return like.new_zeros(())
    return torch.stack(torch._foreach_norm(gradient)).double().square().sum().to(like.device)  # it may be offloaded
