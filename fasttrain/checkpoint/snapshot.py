"""Copies of a state in host memory, which a thread writes to the disk while the training changes the state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class HostCopy:
    """Memory for the copy of a state. It is allocated at the first copy and used again for the next ones.

    It is pinned where the state is on a GPU, so that copies run at the speed of the bus.
    """

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def bytes_to_allocate(self, content: Any) -> int:
        """Return the bytes of host memory that a copy of ``content`` needs beyond the memory of the last copy."""
        needed = sum(storage.nbytes() for storage in _storages(content).values())
        return max(0, needed - sum(storage.nbytes() for storage in self._storages))

    def fill(self, content: Any) -> Any:
        """Return a copy of ``content``, which may be nested. It is valid until the next call.

        Tensors that share memory share it in the copy, so ``torch.save`` writes it once.
        """
        free: dict[int, list[torch.UntypedStorage]] = {}
        for storage in self._storages:
            free.setdefault(storage.nbytes(), []).append(storage)
        copies = {}
        for address, source in _storages(content).items():
            same_size = free.get(source.nbytes())
            copies[address] = same_size.pop() if same_size else _allocate(source)
            copies[address].copy_(source, non_blocking=True)
        self._storages = list(copies.values())
        if any(source.device.type == "cuda" for source in _storages(content).values()):
            torch.cuda.synchronize()

        def copied(tensor: Tensor) -> Tensor:
            storage = copies[_address(tensor)]
            empty = torch.empty(0, dtype=tensor.dtype)
            return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

        return _mapped(content, copied)


def _allocate(source: torch.UntypedStorage) -> torch.UntypedStorage:
    pinned = source.device.type == "cuda"
    return torch.empty(source.nbytes(), dtype=torch.uint8, pin_memory=pinned).untyped_storage()


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storages(content: Any) -> dict[int, torch.UntypedStorage]:
    """Return the memory of all tensors, each once."""
    return {_address(tensor): tensor.untyped_storage() for tensor in _tensors(content)}


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        inner: Sequence[Any] = [*content.values()] if isinstance(content, dict) else content
        for value in inner:
            yield from _tensors(value)


def _mapped(content: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of a nested content, in which ``function`` replaces the tensors."""
    if isinstance(content, Tensor):
        tensor = function(content)
        return Parameter(tensor, content.requires_grad) if isinstance(content, Parameter) else tensor
    if isinstance(content, dict):
        items = {key: _mapped(value, function) for key, value in content.items()}
        return items if type(content) is dict else type(content)(items)
    if type(content) in (list, tuple):
        return type(content)(_mapped(value, function) for value in content)
    return copy.deepcopy(content)  # numbers, and small objects of DeepSpeed
