"""Exchange of results between threads of all ranks. Only the training thread may use collectives."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..distributed.world import World, all_gather_object
from ..errors import SaveError

_PATIENCE = timedelta(days=1)  # the watchdog ends ranks whose peers are gone


class Agreement:
    """Actions that succeed on all ranks or fail on all, through the process group's store. Made by all ranks."""

    def __init__(self, world: World) -> None:
        self.world = world
        # A connection of its own: the training thread may block the process group's.
        self._store: Any = _get_default_store().clone() if world.size > 1 else dist.HashStore()  # type: ignore[attr-defined]
        self._store.set_timeout(_PATIENCE)
        self._name = f"fasttrain/{all_gather_object(world, uuid4().hex)[0]}"
        self._count = 0

    def run(self, action: Callable[[], Any]) -> list[Any]:
        """Run an action, whose result is plain JSON. Return the results of all ranks on rank 0, elsewhere nothing.

        Every rank calls it, in one order. Raise SaveError on every rank if an OSError is raised on any. Other errors
        are raised as they are on their rank.
        """
        self._count += 1
        key = f"{self._name}/{self._count}"
        result = error = None
        failure = ""
        try:
            result = action()
        except OSError as problem:
            failure = f"{problem.strerror or problem}: {problem.filename}"
        except Exception as problem:
            failure, error = f"{type(problem).__name__}: {problem}", problem
        self._store.set(f"{key}/{self.world.rank}", json.dumps([result, failure]))
        results = []
        if self.world.is_main:
            ranks = [f"{key}/{rank}" for rank in range(self.world.size)]
            parts = [json.loads(self._store.get(rank)) for rank in ranks]
            results = [part for part, _ in parts]
            for rank in ranks:
                self._store.delete_key(rank)
            self._store.set(key, json.dumps(next((failed for _, failed in parts if failed), "")))
        if error is not None:
            raise error
        if failure := json.loads(self._store.get(key)):
            raise SaveError(failure)
        return results
