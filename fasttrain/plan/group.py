"""A process group of any size with one process. It records its messages and sends nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """A collective operation: its kind, its bytes and its purpose.

    ``bytes`` is the size of its largest tensor: the reduced tensor, the output of a gather, or the input of a scatter.
    """

    kind: str
    bytes: int
    about: str


class _Sent(dist.distributed_c10d.Work):
    def wait(self, timeout: Any = None) -> bool:
        return True


class PlannedGroup(dist.ProcessGroup):
    """Rank 0 of ``size`` ranks. Nothing is received, so tensors must have no values."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.messages: list[Message] = []
        self.about = "loss and centre"

    def _send(self, kind: str, tensor: Tensor) -> _Sent:
        self.messages.append(Message(kind, tensor.nbytes, self.about))
        return _Sent()

    def allreduce(self, tensors: Sequence[Tensor], options: object = None) -> _Sent:  # type: ignore[override]
        """Record an all-reduce."""
        return self._send("all_reduce", tensors[0])

    def broadcast(self, tensors: Sequence[Tensor], options: object = None) -> _Sent:  # type: ignore[override]
        """Record a broadcast."""
        return self._send("broadcast", tensors[0])

    def all_gather_single(self, output: Tensor, input: Tensor, options: object = None) -> _Sent:
        """Record an all-gather into one tensor."""
        return self._send("all_gather", output)

    def _allgather_base(self, output: Tensor, input: Tensor, opts: Any = None) -> _Sent:
        return self.all_gather_single(output, input)  # its name before torch 2.14

    def all_to_all_single(self, output: Tensor, input: Tensor, *_: Any) -> _Sent:
        """Record an exchange of rows between all ranks."""
        return self._send("all_to_all", input)

    def alltoall_base(self, output: Tensor, input: Tensor, *_: Any) -> _Sent:
        """Record an exchange under its name before torch 2.14."""
        return self.all_to_all_single(output, input)

    @contextmanager
    def topic(self, about: str) -> Iterator[None]:
        """Set the purpose of the messages inside this context."""
        before, self.about = self.about, about
        yield
        self.about = before


def planned_group(size: int) -> PlannedGroup | None:
    """Return rank 0 of ``size`` ranks, or None for one rank. torch's default process group is not touched."""
    return None if size == 1 else PlannedGroup(0, size)
