"""Who takes part in the kernel benchmarks: for every operation a few cases, and ours beside each peer.

A contestant is one small function ``make(case) -> loss``: ``loss(*inputs)`` is a scalar, and what is timed is that loss
with the gradients of all inputs that require one. The contestants of a case get the very same tensors and must agree
on the loss and the gradients before anything is timed. One that cannot run a case raises NotRun, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

OURS = "ours"
Loss = Callable[..., Tensor]
Step = Callable[[], tuple[Tensor, ...]]


class NotRun(Exception):
    """A contestant cannot run a case here; the message says why, for the report."""


@dataclass(frozen=True)
class Case:
    """One size of one operation."""

    name: str
    rows: int
    dim: int
    columns: int = 0
    scale: float = 10.0
    """1 / temperature, or kappa."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """In half precision the loss gets what a network under autocast hands to it, and runs under autocast too."""

    @property
    def temperature(self) -> float:
        return 1 / self.scale


@dataclass(frozen=True, eq=False)
class Operation:
    """What is computed, in which sizes, from which tensors and by whom; ``baseline`` is the peer to compare with."""

    name: str
    cases: tuple[Case, ...]
    inputs: Callable[[Case, torch.Generator], tuple[Tensor, ...]]
    contestants: dict[str, Callable[[Case], Loss]]
    baseline: str
    flops: Callable[[Case], float] | None = None
    """Floating point operations of our forward and backward."""

    def draw(self, case: Case) -> tuple[Tensor, ...]:
        """The inputs of a case, the same for every contestant."""
        drawn = self.inputs(case, torch.Generator().manual_seed(0))
        return tuple(x.detach().to(case.device, case.dtype).requires_grad_(x.requires_grad) for x in drawn)

    def loss(self, name: str, case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        """A contestant's loss on these inputs. Raises NotRun."""
        try:
            loss = self.contestants[name](case)
        except ModuleNotFoundError as error:
            raise NotRun(f"{error.name} is not installed; pip install -e '.[bench]'") from error
        if case.dtype.itemsize > 2:
            return lambda: loss(*inputs)

        def lowered() -> Tensor:
            with torch.autocast(torch.device(case.device).type, case.dtype):
                return loss(*inputs)

        return lowered

    def step(self, name: str, case: Case, inputs: tuple[Tensor, ...] | None = None, *, wait: bool = True) -> Step:
        """One forward and backward: the loss and the gradients; ``wait`` for the device to be done. Raises NotRun."""
        inputs = self.draw(case) if inputs is None else inputs
        loss = self.loss(name, case, inputs)
        leaves = [x for x in inputs if x.requires_grad]

        def step() -> tuple[Tensor, ...]:
            value = loss()
            gradients = torch.autograd.grad(value, leaves) if leaves else ()
            if wait and case.device != "cpu":
                torch.cuda.synchronize()
            return value.detach(), *gradients

        return step


def distances(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """How far the loss and every gradient are from the expected, as a part of that one's norm."""
    norm = torch.linalg.vector_norm
    return [(norm(a.float() - b.float()) / norm(b.float())).item() for a, b in zip(found, expected, strict=True)]


def check_agreement(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], who: str) -> None:
    """Raise AssertionError if two contestants do not compute the same loss and gradients, to what fp32 explains."""
    for number, apart in enumerate(distances(found, expected)):
        if not apart < 1e-3:
            raise AssertionError(f"{who} differs from ours: output {number} by {apart:.1e} of its norm")
