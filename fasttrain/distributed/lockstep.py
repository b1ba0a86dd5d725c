"""The batches of an epoch where several ranks take them together, and what they learn of the data on the way."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

import torch
import torch.distributed as dist

from ..pipelines import Batch, DataError, Loader


def in_step(loader: Loader, epoch: int, start_step: int = 0) -> Generator[Batch, None, None]:
    """Batches ``start_step``, ... of an epoch, as many on every rank.

    A DataError that one rank meets is raised on all of them: none then waits for another that is gone. Collective:
    every rank takes every batch; it costs one reduction of a number a batch.
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
    """Names that any rank has. Collective."""
    everyone = [names] * world_size
    if world_size > 1:
        dist.all_gather_object(everyone, names)
    return set().union(*everyone)


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
