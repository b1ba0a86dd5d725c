"""The average of gradients over the ranks at stage 0, sent in buckets while the backward pass continues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 25 * 2**20 // 4
"""Elements per message: 25 MiB of fp32, as torch's DistributedDataParallel sends them."""
_ALIGNMENT = 64
"""Elements to which a gradient's place in a bucket is aligned, so that fused optimizers can read it in wide words."""


def message_type(precision: str, *, on_gpu: bool) -> torch.dtype:
    """Return the type in which gradients are sent."""
    return torch.bfloat16 if precision == "bf16" and on_gpu else torch.float32


@dataclass(frozen=True)
class _Sent:
    parameters: list[Tensor]
    flat: Tensor
    work: Any


class GradientReduction:
    """Makes every gradient the mean over the ranks. Stages 1 to 3 are reduced by DeepSpeed.

    A bucket is sent as soon as backward has all of its gradients and the buckets before it are sent, so every rank
    sends them in the same order. ``dtype`` is the precision of the messages; gradients stay fp32. A parameter without
    a gradient gets the mean of the other ranks, or 0.
    """

    def __init__(self, parameters: Iterable[Tensor], world_size: int, dtype: torch.dtype) -> None:
        self.world_size, self.dtype = world_size, dtype
        trained = [p for p in parameters if p.requires_grad]
        self._buckets = buckets(trained[::-1], BUCKET)  # backward reaches the last parameters first
        self._bucket_of = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []
        """Gradients that each bucket lacks; empty outside of the backward pass whose gradients are sent."""
        self._sent: list[_Sent] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._add) for p in trained]  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Remove the hooks, which would keep the network's memory."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """Within the context, a backward pass ends with averaged gradients. Collective."""
        self._missing, self._sent = [len(bucket) for bucket in self._buckets], []
        try:
            yield
        finally:
            self._missing = []
        while len(self._sent) < len(self._buckets):
            self._send()
        for sent in self._sent:
            sent.work.wait()
            flat = sent.flat.float().div_(self.world_size)
            for parameter, view in zip(sent.parameters, _views(flat, sent.parameters), strict=True):
                if parameter.grad is not None:
                    raise RuntimeError("a gradient was computed again after it was sent: two passes in one backward")
                parameter.grad = view
        self._sent = []

    def _add(self, parameter: Tensor) -> None:
        if self._missing:
            self._missing[self._bucket_of[parameter]] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Move the gradients of the next bucket into one tensor and start its reduction."""
        bucket = self._buckets[len(self._sent)]
        flat = torch.zeros(sum(places(p.numel()) for p in bucket), dtype=self.dtype, device=bucket[0].device)
        pairs = [(v, p.grad) for v, p in zip(_views(flat, bucket), bucket, strict=True) if p.grad is not None]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [gradient for _, gradient in pairs])
        for parameter in bucket:
            parameter.grad = None
        self._sent.append(_Sent(bucket, flat, dist.all_reduce(flat, async_op=True)))


def buckets(parameters: Iterable[Tensor], limit: int) -> list[list[Tensor]]:
    """Return parameters in order, in lists of at most ``limit`` elements each. A larger one is alone."""
    lists: list[list[Tensor]] = []
    size = 0
    for parameter in parameters:
        if not lists or size + parameter.numel() > limit:
            lists.append([])
            size = 0
        lists[-1].append(parameter)
        size += parameter.numel()
    return lists


def places(elements: int) -> int:
    """Return the elements of a bucket that a gradient of this size takes."""
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _views(flat: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the place of each parameter's gradient in a bucket."""
    views, start = [], 0
    for parameter in parameters:
        views.append(flat[start : start + parameter.numel()].view_as(parameter))
        start += places(parameter.numel())
    return views
