"""Run by two_ranks.py: checkpoints of one rank and of two, resumed by either, also at other stages."""

from dataclasses import replace

import torch

from fasttrain.checkpoint.card import Card, tag
from fasttrain.checkpoint.store import choose, restore
from fasttrain.distributed.world import all_gather_object
from fasttrain.engine.zero import inner_optimizer
from fasttrain.errors import SaveError
from tests.checkpoints import largest_file, publish, train
from tests.distributed.two_ranks import BATCH, full_state, make

RESUMED = [
    ("swav", 2, "lars"),
    ("dino", 3, "sgd"),
    ("moco", 1, "sgd"),
    ("byol", 3, "adamw"),
    ("deepcluster", 2, "lamb"),
]
_LR = {"lars": 32.0, "sgd": 4.0, "adamw": 0.05, "lamb": 0.05}
STEP = tag(2)


def resumed(case, world, folder):
    """Return the state after 3 steps: without a break, and resumed after 2 from several checkpoints.

    Two ranks resume from their own checkpoint, at their own and at another stage, and from the checkpoint of one rank.
    """
    stage, own = case[1], folder / str(world.size) / folder_of(case)
    sources = {"straight": (stage, None), "resumed": (stage, own)}
    if world.size > 1:
        sources |= {"of one rank": (stage, folder / "1" / folder_of(case)), "other stage": (other(stage), own)}
    for path in (own, folder / "resharded" / folder_of(case)):
        path.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, (stage_now, source) in sources.items():
        engine = engine_of(case, stage_now, world)
        if source is None:
            train(engine, range(2))
            publish(engine, own, card_of(case, engine), keep=True)
        else:
            assert restore(engine, source / STEP, card_of(case, engine)) == 2
        if name == "other stage":
            publish(engine, folder / "resharded" / folder_of(case), card_of(case, engine), keep=True)
        results[name] = {"losses": torch.tensor(train(engine, range(2, 3))), **full_state(engine)}
        if name in ("straight", "resumed"):
            states = inner_optimizer(engine.optimizer).state.values()
            moments = [torch.as_tensor(value).clone() for state in states for value in state.values()]
            results[name] |= {f"moment {number}": value for number, value in enumerate(moments)}
        engine.close()
    return results


def full_disk(world, folder):
    """Return all ranks' messages after the last rank's disk was full, and the checkpoint that exists then."""
    case = RESUMED[0]
    engine = engine_of(case, case[1], world)
    publish(engine, folder, card_of(case, engine), keep=False)
    message = "none"
    try:
        if world.rank == world.size - 1:
            with largest_file(1000):
                publish(engine, folder, replace(card_of(case, engine), step=3), keep=False)
        else:
            publish(engine, folder, replace(card_of(case, engine), step=3), keep=False)
    except SaveError as error:
        message = str(error)
    engine.close()
    path, _ = choose("auto", folder, world)
    return all_gather_object(world, message), [path.name for path in folder.glob("*step*")], path.name


def engine_of(case, stage, world):
    """Return the case's engine. One rank trains at stage 0."""
    method, _, optimizer = case
    # MoCo does not synchronise BatchNorm, so two ranks normalise over two batches.
    options = {"bn_splits": 2 // world.size} if method == "moco" else {}
    return make(method, False, stage, world, optimizer=optimizer, lr=_LR[optimizer], **options)


def card_of(case, engine):
    """Return the card of a case's checkpoints."""
    return Card(case[0], False, "conv_small", case[2], 2, engine.world.size, engine.stage, "0", BATCH)


def other(stage):
    """Return a stage with another layout of shards, or other files."""
    return 2 if stage == 1 else 1


def folder_of(case):
    """Return the name of a case's folder."""
    return "-".join(map(str, case))
