"""Exact nearest neighbours by cosine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2**30
"""Bytes per block of a bank that is not on the queries' device."""


def nearest(bank: Tensor, queries: Tensor, k: int, *, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Return the highest cosines, in descending order, and their rows of the bank [N, D]: both [M, min(k, N)].

    At most chunk x N cosines exist at a time, on the device of the queries [M, D]. A bank on another device (because it
    is too large for the GPU) is copied once, in blocks of 1 GiB. Larger chunks are slower on a CPU: above 32 MiB, which
    is glibc's largest mmap threshold, every product gets new pages, and they take a fifth of its time.
    """
    chunks = torch.split(F.normalize(queries.float(), dim=1), chunk)
    best: list[tuple[Tensor, Tensor]] = []
    first = 0
    for block in _blocks(bank, queries.device):
        unit = F.normalize(block.float(), dim=1)
        nearest_rows = [_topk(rows @ unit.T, k) for rows in chunks]
        nearest_rows = [(cosines, rows + first) for cosines, rows in nearest_rows]
        best = [_merge(*pair, k) for pair in zip(best, nearest_rows, strict=True)] if best else nearest_rows
        first += len(block)
    cosines, rows = zip(*best, strict=True)
    return torch.cat(cosines), torch.cat(rows)


def _topk(cosines: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, columns = cosines.topk(min(k, cosines.shape[1]), dim=1)
    return values, columns


def _merge(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest of two lists of neighbours."""
    cosines, columns = _topk(torch.cat([left[0], right[0]], dim=1), k)
    return cosines, torch.cat([left[1], right[1]], dim=1).gather(1, columns)


def _blocks(bank: Tensor, device: torch.device) -> Iterator[Tensor]:
    if bank.device == device:
        yield bank
    else:
        for block in torch.split(bank, max(_BLOCK // (4 * bank.shape[1]), 1)):
            yield block.to(device)
