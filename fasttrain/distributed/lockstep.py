"""Iterate over an epoch on all ranks in lockstep, and collect names from all ranks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import torch
import torch.distributed as dist

from ..pipelines import Batch, DataError, Loader


def in_step(loader: Loader, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
    """Yield the batches ``start_step``, ``start_step + 1``, ... of an epoch, the same number on every rank.

    If one rank meets a DataError, all ranks raise it, so no rank waits for another that has ended. Collective: every
    rank takes every batch. The cost is one reduction of one number per batch.
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
            lines: list[str | None] = [None] * loader.world_size
            dist.all_gather_object(lines, str(failure) if failure else None)
            raise DataError(next(line for line in lines if line))
    elif failure is not None:
        raise failure
