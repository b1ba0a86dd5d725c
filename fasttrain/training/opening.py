"""Open a data set once per run: rank 0 lists folders and indexes shards, and the other ranks receive the result.

Otherwise all ranks would read the same folders: minutes for a large data set on a shared disk.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ..config.settings import TrainConfig
from ..distributed.world import World, all_gather_object
from ..errors import ConfigError, DataError
from ..pipelines import Splits, open_source
from ..pipelines.sources.listing import digest_of, sampled_digest


def open_together(train: TrainConfig, cache: Path, world: World) -> Splits:
    """Return the data set of ``train``, as rank 0 found it. ``cache`` is a folder for the index of shards.

    Raise DataError or ConfigError, on all ranks, if rank 0 cannot open it, or if the images differ between machines.
    Every machine compares a few images only: a file that is missing there is reported when it is read. Collective.
    """
    if world.size == 1:
        return _open(train, cache)
    opened: list[Splits | DataError | ConfigError | None] = [None]
    if world.is_main:
        try:
            opened = [_open(train, cache)]
        except (DataError, ConfigError) as error:
            opened = [error]
    dist.broadcast_object_list(opened)
    (splits,) = opened
    if isinstance(splits, Exception):
        raise splits
    assert splits is not None
    _check_machines(splits, world)
    return splits


def _open(train: TrainConfig, cache: Path) -> Splits:
    return open_source(train.data_path, train.val_path, weights=train.data_weights, cache=cache)


def _check_machines(splits: Splits, world: World) -> None:
    """Raise DataError, on all ranks, if a machine reads other images than rank 0. Collective."""
    digest = None
    if world.local_rank == 0:
        digest = digest_of(*(sampled_digest(source) for source in (splits.train, splits.val) if source is not None))
    first, *others = all_gather_object(world, digest)
    for rank, other in enumerate(others, start=1):
        if other not in (None, first):
            raise DataError(
                f"--data_path: rank 0 and rank {rank} read other images from the same paths. Give all machines the "
                "same files, for example on a shared disk."
            )
