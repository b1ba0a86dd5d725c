"""The nearest of many features by cosine: exact, through a short list in bf16 where products of it are faster."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST = 32
"""Neighbours up to which a short list pays: what is on it is compared again, row by row."""
_DENSE = 0.25
"""Share of queries whose list was too short from which on none is made."""
_GROUPED = 8
"""Columns that are looked at as one at first, where the highest of many are to be found."""
_BLOCK = 2**30
"""Bytes of a bank in another memory that are fetched at once."""


def nearest(bank: Tensor, queries: Tensor, k: int, *, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Cosines, highest first, and rows of the bank [N, D] nearest to each of the queries [M, D]: both [M, min(k, N)].

    In chunks of queries, so that at most chunk x N cosines exist, on the device of the queries: a bank that is kept
    elsewhere, as one too large for a GPU, passes by once, 1 GiB at a time. Larger chunks are slower on a CPU: beyond
    32 MiB every product is written to new pages, which take a fifth of its time (glibc's largest mmap threshold).
    """
    best: tuple[Tensor, Tensor] | None = None
    passed = 0
    for block in _blocks(bank, queries.device):
        search = Nearest(block)
        parts = [search(rows, k) for rows in torch.split(queries, chunk)]
        cosines, found = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) + passed
        if best is not None:
            cosines, found = torch.cat([best[0], cosines], dim=1), torch.cat([best[1], found], dim=1)
            cosines, order = cosines.topk(min(k, cosines.shape[1]), dim=1)
            found = found.gather(1, order)
        best, passed = (cosines, found), passed + len(block)
    assert best is not None
    return best


class Nearest:
    """Finds for queries [M, D] the rows of a bank [N, D] with the highest cosines.

    Of q and r, of unit norm, and their roundings to bf16 q' and r', Cauchy and Schwarz have

        |<q, r> - <q', r'>| <= |q - q'| + |q'| |r - r'|,

    so what is not on a list of the highest <q', r'> has at most the lowest of it and that much more, and what the sums
    and the result, bf16 too, are rounded by. If the k-th highest <q, r> of the list, in fp32, is no lower, then the
    k highest are on it. The few queries for which it is lower are compared with the whole bank in fp32; where they are
    many, as in a bank whose rows are nearly the same, lists are given up.
    """

    def __init__(self, bank: Tensor) -> None:
        self._bank = F.normalize(bank.float(), dim=1)
        self._low = self._bank.bfloat16() if _bf16_is_faster(bank.device) else None
        self._error = torch.tensor(0.0) if self._low is None else _apart(self._bank, self._low).max()

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines, highest first, and rows of the bank, both [M, min(k, N)]."""
        k = min(k, len(self._bank))
        rows = F.normalize(queries.float(), dim=1)
        listed = 2 * k + 8
        if self._low is None or k > _MOST or listed >= len(self._bank):
            return self._among_all(rows, k)
        low = rows.bfloat16()
        highest, at = _highest(low @ self._low.T, listed)
        lowest = highest.amin(1).float()
        rounding = lowest.abs() * 2**-8 + rows.shape[1] * 2**-23
        others = lowest + _apart(rows, low) + low.float().norm(dim=1) * self._error + rounding
        again = self._bank.index_select(0, at.flatten()).view(*at.shape, -1)  # in a third of the time of [at]
        cosines, order = torch.bmm(again, rows[:, :, None])[:, :, 0].topk(k, dim=1)
        found = at.gather(1, order)
        unsure = ~(cosines[:, -1] >= others)
        if unsure.any():
            cosines[unsure], found[unsure] = self._among_all(rows[unsure], k)
            if unsure.float().mean() > _DENSE:
                self._low = None
        return cosines, found

    def _among_all(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        cosines, found = (rows @ self._bank.T).topk(k, dim=1)
        return cosines, found


def _highest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row [M, N], in no order, and their columns: ``topk`` in less time where k is far below N.

    First the maxima of groups, each of _GROUPED columns that lie N / _GROUPED apart. Whatever is among the k highest of
    a row is in one of the k groups of highest maxima: every group that stands before its own holds a higher one.
    """
    rows, columns = scores.shape
    count = columns // _GROUPED
    if count < 2 * k:
        return scores.topk(k, dim=1, sorted=False)
    whole = count * _GROUPED
    groups = scores[:, :whole].view(rows, _GROUPED, count)
    chosen = groups.amax(1).topk(k, dim=1, sorted=False).indices[:, None].expand(-1, _GROUPED, -1)
    first = torch.arange(0, whole, count, device=scores.device)[:, None]
    rest = torch.arange(whole, columns, device=scores.device).expand(rows, -1)
    among = torch.cat([groups.gather(2, chosen).flatten(1), scores[:, whole:]], dim=1)
    values, at = among.topk(k, dim=1, sorted=False)
    return values, torch.cat([(chosen + first).flatten(1), rest], dim=1).gather(1, at)


def _blocks(bank: Tensor, device: torch.device) -> Iterator[Tensor]:
    if bank.device == device:
        yield bank
    else:
        for block in torch.split(bank, max(_BLOCK // (4 * bank.shape[1]), 1)):
            yield block.to(device)


def _apart(rows: Tensor, rounded: Tensor) -> Tensor:
    distances: Tensor = (rows - rounded.float()).norm(dim=1)
    return distances


def _bf16_is_faster(device: torch.device) -> bool:
    """Whether products of bf16 have instructions of their own: without, CPUs take 5 times as long as in fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
