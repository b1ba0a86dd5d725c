"""What a forward pass writes into a method beside gradients, kept so that a step can be taken back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.base import gather_detached
from ..methods import Method


class Undo:
    """A copy of every buffer of a method (queues, centres, BatchNorm's statistics), as it was before a step.

    A memory of all images (``Method.image_memories``) may be larger than the network, so only the rows of the batch's
    images are kept, which are all that a step writes.
    """

    def __init__(self, method: Method) -> None:
        self.group = method.group
        self._memories = [(method.get_buffer(name), dim) for name, dim in method.image_memories.items()]
        self._buffers = [b for name, b in method.named_buffers() if name not in method.image_memories]
        self._copies = [torch.empty_like(buffer) for buffer in self._buffers]
        self._rows: list[tuple[Tensor, list[Tensor]]] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Keep the buffers; before a step's first micro-step."""
        self._rows = []
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    @torch.no_grad()
    def keep_rows(self, indices: Tensor) -> None:
        """Keep the rows of the images ``indices`` [B] of all ranks; before every micro-step."""
        if self._memories:
            everyone = gather_detached(indices.to(self._memories[0][0].device), self.group)
            self._rows.append((everyone, [memory.index_select(dim, everyone) for memory, dim in self._memories]))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back to what it was at :meth:`begin`."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._copies)
        for indices, rows in reversed(self._rows):
            for (memory, dim), kept in zip(self._memories, rows, strict=True):
                memory.index_copy_(dim, indices, kept)
