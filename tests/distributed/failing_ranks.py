"""Run by test_failing_ranks.py in two processes, one start for all: what happens to one rank must happen to both.

Every rank writes what it saw to ``FOLDER/rank-N.json``; the last case ends the processes.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from fasttrain.distributed.world import World, initialise, prepare_environment
from fasttrain.run import main
from fasttrain.training.guard import Guard
from tests.small_runs import flags
from tests.training.test_guard import guarded, state, steps

STAGES = (0, 2, 3)


def bad_steps(stage, world):
    """As test_guard.py has it in one process, with one rank's batch bad: skipped by both, and nothing left behind."""
    found, ends = [], []
    for poisoned in ((1,), ()):
        with guarded("moco", stage, queue_length=16) as guard:
            mine = poisoned if world.rank == 1 else ()
            found.append(steps(guard, (0, 1, 2) if poisoned else (0, 2), mine))
            ends.append(state(guard.engine))
    norms = [one.grad_norm for one in found[0]]
    return {
        "faults": [one.fault for one in found[0]],
        "norms": [norms[0], norms[2]],
        "differ": [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])],
    }


def stopped(data, output, world):
    """A run of which only rank 1 gets a signal, in its third step; then as much of it again as is missing."""
    once = Guard.step

    def signalled(self, batches, step, signals):
        if world.rank == 1 and step.index == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return once(self, batches, step, signals)

    Guard.step = signalled
    given = flags(data, output, "--knn_every", 0)
    status = [main(given)]
    Guard.step = once
    latest = (output / "checkpoints" / "latest").read_text()
    return {"status": [*status, main([*given, "--limit_steps", "4"])], "latest": latest}


def crash(data, output, world):
    """Rank 1 fails in its third step."""
    once = Guard.step

    def failing(self, batches, step, signals):
        if world.rank == 1 and step.index == 2:
            (output / "failed_at").write_text(str(time.time()))
            raise RuntimeError("a bug in the step")
        return once(self, batches, step, signals)

    Guard.step = failing
    return main(flags(data, output, "--knn_every", 0))


def run(data, folder):
    world = World.from_environment()
    initialise(world)
    found = {"bad_steps": {stage: bad_steps(stage, world) for stage in STAGES}}
    found["signal"] = stopped(data, folder / "signal", world)
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(found))
    return crash(data, folder / "crash", world)


if __name__ == "__main__":
    prepare_environment()
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2])))
