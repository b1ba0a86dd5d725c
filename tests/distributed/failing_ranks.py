"""Run by test_failing_ranks.py in two processes, one start for all cases: one rank's event must reach both.

Every rank writes its observations to ``FOLDER/rank-N.json``. The last case ends the processes.
"""

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from fasttrain.config.resolve import resolve
from fasttrain.distributed.lockstep import Feed
from fasttrain.distributed.world import World, initialise, prepare_environment
from fasttrain.errors import DataError
from fasttrain.evaluate import evaluator
from fasttrain.run import main
from fasttrain.training import opening
from fasttrain.training.guard import Guard
from fasttrain.training.trainer import train
from tests.small_runs import SMALL, flags
from tests.training.test_guard import guarded, state, steps

STAGES = (0, 2, 3)


def bad_steps(stage, world):
    """Poison rank 1's batch of step 1. Return the findings and the differences from a run without that step."""
    findings, ends = [], []
    for indices, poisoned in (((0, 1, 2), (1,)), ((0, 2), ())):
        with guarded("moco", stage, queue_length=16) as guard:
            findings.append(steps(guard, indices, poisoned if world.rank == 1 else ()))
            ends.append(state(guard.engine))
    return {
        "faults": [finding.fault for finding in findings[0]],
        "norms": [findings[0][index].grad_norm for index in (0, 2)],
        "differ": [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])],
    }


@contextmanager
def in_step_2_of_rank_1(world, action):
    """Call ``action`` at the start of rank 1's third step."""
    original = Guard.step

    def step(self, batches, step, *status):
        if world.rank == 1 and step.index == 2:
            action()
        return original(self, batches, step, *status)

    Guard.step = step
    yield
    Guard.step = original


def stopped(data, output, world):
    """Send a signal to rank 1 only, then run one more step."""
    arguments = flags(data, output, "--knn_every", 0)
    with in_step_2_of_rank_1(world, lambda: os.kill(os.getpid(), signal.SIGUSR1)):
        status = main(arguments)
    latest = (output / "checkpoints" / "latest").read_text()
    return {"status": [status, main([*arguments, "--limit_steps", "4"])], "latest": latest}


def without_images(data, output, world):
    """Let the images of rank 1 fail in the third step, then run to the end."""
    values = {**SMALL, "data_path": str(data), "output_dir": str(output), "knn_every": 0}
    config, following = resolve("simclr", values), Feed.next

    def next_batch(self):
        if world.rank == 1 and self.loader.state_dict()["epoch"] == 1:
            self.failure = DataError("no image can be read")
        return following(self)

    Feed.next = next_batch
    try:
        train(config, world)
    except DataError as error:
        reason = str(error)
    Feed.next = following
    latest = (output / "checkpoints" / "latest").read_text()
    return {"reason": reason, "latest": latest, "steps": train(config, world).steps}


def opened(data, folder, world):
    """Open data on rank 0 only, data that is missing, and data that another machine has not."""
    machine = World(world.rank, world.size, 0, 1)
    own, read = opening.open_source, []

    def counted(*paths, **options):
        read.append(paths)
        return own(*paths, **options)

    def attempt(path):
        train = resolve("simclr", {"recipe": "cifar", "data_path": str(path)}).train
        try:
            return len(opening.open_together(train, folder / "index", machine).train)
        except DataError as error:
            return str(error).replace(str(folder), "")

    opening.open_source = counted
    results = [attempt(data), attempt(folder / "none")]
    digest = opening.sampled_digest
    opening.sampled_digest = lambda source: f"{digest(source)} {world.rank}"
    results.append(attempt(data))
    opening.open_source, opening.sampled_digest = own, digest
    return {"results": results, "read": len(read)}


def stopped_in_knn(data, output, world):
    """Send a signal to rank 1 only, while both extract the features of the untrained network."""
    extract = evaluator.extract

    def interrupted(*arguments, **options):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return extract(*arguments, **options)

    evaluator.extract = interrupted
    status = main(flags(data, output))
    evaluator.extract = extract
    return {"status": status, "evaluated": (output / "baseline.json").exists()}


def crash(data, output, world):
    """Fail in rank 1 only."""

    def fail():
        raise RuntimeError("a bug in the step")

    with in_step_2_of_rank_1(world, fail):
        return main(flags(data, output, "--knn_every", 0))


def run(data, folder):
    world = World.from_environment()
    initialise(world)
    results = {"bad_steps": {stage: bad_steps(stage, world) for stage in STAGES}}
    results["signal"] = stopped(data, folder / "signal", world)
    results["images"] = without_images(data, folder / "images", world)
    results["opened"] = opened(data, folder, world)
    results["signal_in_knn"] = stopped_in_knn(data, folder / "knn", world)
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(results))
    return crash(data, folder / "crash", world)


if __name__ == "__main__":
    prepare_environment()
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2])))
