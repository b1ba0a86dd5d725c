"""Contestants of the kernel benchmarks: a few cases per operation, with ours and the peers.

A contestant is one small function ``make(case) -> loss``, and ``loss(*inputs)`` is a scalar. A benchmark times the loss
with the gradients of all inputs that require one. All contestants of a case get the same tensors, and must agree on the
loss and the gradients before the timing. A contestant that cannot run a case raises NotRun with the reason.
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
    """Raised if a contestant cannot run a case here. The message is the reason for the report."""


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
    """In half precision the inputs are as from a network under autocast, and the loss runs under autocast too."""

    @property
    def temperature(self) -> float:
        return 1 / self.scale


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation with its cases, inputs and contestants. ``baseline`` is the peer to compare with."""

    name: str
    cases: tuple[Case, ...]
    inputs: Callable[[Case, torch.Generator], tuple[Tensor, ...]]
    contestants: dict[str, Callable[[Case], Loss]]
    baseline: str
    flops: Callable[[Case], float] | None = None
    """Floating point operations of our forward and backward pass."""

    def draw(self, case: Case) -> tuple[Tensor, ...]:
        """Return the inputs of a case, which are the same for every contestant."""
        drawn = self.inputs(case, torch.Generator().manual_seed(0))
        return tuple(x.detach().to(case.device, case.dtype).requires_grad_(x.requires_grad) for x in drawn)

    def loss(self, name: str, case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        """Return a contestant's loss on these inputs. Raise NotRun if it cannot run."""
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
        """Return a function that runs forward and backward, and returns the loss and the gradients.

        With ``wait`` it returns after the device has finished. Raise NotRun if the contestant cannot run.
        """
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


def distances(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Return the distance of the loss and of each gradient from the expected one, relative to its norm."""
    norm = torch.linalg.vector_norm
    return [(norm(a.float() - b.float()) / norm(b.float())).item() for a, b in zip(outputs, expected, strict=True)]


def check_agreement(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], who: str) -> None:
    """Raise AssertionError if the loss or a gradient differs by more than 1e-3 of its norm, which fp32 explains."""
    for number, distance in enumerate(distances(outputs, expected)):
        if not distance < 1e-3:
            raise AssertionError(f"{who} differs from ours: output {number} by {distance:.1e} of its norm")
