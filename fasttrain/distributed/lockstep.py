"""Iterate over an epoch on all ranks in lockstep, and collect names from all ranks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import NoReturn

import torch
import torch.distributed as dist

from ..pipelines import Batch, DataError, Loader, sides


def in_step(loader: Loader, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
    """Yield the batches ``start_step``, ``start_step + 1``, ... of an epoch, the same number on every rank.

    If one rank meets a DataError, all ranks raise it, so no rank waits for another that has ended. Collective: every
    rank takes every batch. The cost is one reduction of one number per batch, which :class:`Feed` saves in training.
    """
    with closing(loader.epoch(epoch, start_step)) as batches:
        while True:
            batch, failure = None, None
            try:
                batch = next(batches, None)
            except DataError as error:
                failure = error
            _raise_together(failure, loader)
            if batch is None:
                return
            yield batch


class Feed:
    """The batches of an epoch from step ``start_step`` on, for steps that end with a reduction over all ranks.

    Once this rank's data fails, black batches follow, so that no rank waits for another. ``failure`` is the reason. A
    rank alone raises it.
    """

    def __init__(self, loader: Loader, epoch: int, start_step: int = 0) -> None:
        self.loader = loader
        self.failure: DataError | None = None
        self._batches = loader.epoch(epoch, start_step)

    def next(self) -> Batch:
        """Return the next batch."""
        if self.failure is None:
            try:
                return next(self._batches)
            except DataError as error:
                if self.loader.world_size == 1:
                    raise
                self.failure = error
        return _black(self.loader)

    def raise_failure(self) -> NoReturn:
        """Raise the DataError of the first rank that has one. Collective."""
        _raise_first(self.failure, self.loader)

    def close(self) -> None:
        """End the epoch."""
        self._batches.close()


def _black(loader: Loader) -> Batch:
    """Return a batch of black views of image 0."""
    recipe, batch, device = loader.recipe, loader.batch_size, loader.device
    views = [torch.zeros(n, batch, *sides(size), recipe.channels, device=device) for size, n in recipe.groups]
    indices = torch.zeros(batch, dtype=torch.int64, device=device)
    return Batch(tuple(view.permute(0, 1, 4, 2, 3) for view in views), None, indices)


def of_all_ranks(names: set[str], world_size: int) -> set[str]:
    """Return the union of all ranks' names. Collective."""
    per_rank = [names] * world_size
    if world_size > 1:
        dist.all_gather_object(per_rank, names)
    return set().union(*per_rank)


def _raise_together(failure: DataError | None, loader: Loader) -> None:
    if loader.world_size > 1:
        failed = torch.tensor(float(failure is not None), device=loader.device)
        dist.all_reduce(failed)
        if failed:
            _raise_first(failure, loader)
    elif failure is not None:
        raise failure


def _raise_first(failure: DataError | None, loader: Loader) -> NoReturn:
    """Raise the DataError of the first rank that has one. Collective."""
    lines: list[str | None] = [None] * loader.world_size
    dist.all_gather_object(lines, str(failure) if failure else None)
    raise DataError(next(line for line in lines if line))
