"""Run by two_ranks.py: checkpoints of one rank and of two, taken up by either, at other stages too."""

import resource
from dataclasses import replace

import torch

from fasttrain.checkpoint.card import Card
from fasttrain.checkpoint.store import choose, publish, restore
from fasttrain.distributed.world import all_gather_object
from fasttrain.engine.zero import inner_optimizer
from fasttrain.errors import SaveError
from tests.distributed.two_ranks import BATCH, begin, full_state, made, steps

RESUMED = [
    ("swav", 2, "lars"),
    ("dino", 3, "sgd"),
    ("moco", 1, "sgd"),
    ("byol", 3, "adamw"),
    ("deepcluster", 2, "lamb"),
]
_LR = {"lars": 32.0, "sgd": 4.0, "adamw": 0.05, "lamb": 0.05}
STEP = "step-00000002"


def resumed(case, world, folder):
    """Everything after 3 steps, straight on and resumed after 2, here and by others.

    By others: two ranks go on from the checkpoint of the one rank that ran before, and from their own at another stage.
    """
    stage, mine = case[1], folder / str(world.size) / folder_of(case)
    sources = {"straight": (stage, None), "resumed": (stage, mine)}
    if world.size > 1:
        sources |= {"of one rank": (stage, folder / "1" / folder_of(case)), "other stage": (other(stage), mine)}
    found = {}
    for what, (own, source) in sources.items():
        engine = engine_of(case, own, world)
        if source is None:
            begin(engine)
            steps(engine, range(2))
            publish(engine, mine, card_of(case, engine), keep=True)
        else:
            assert restore(engine, source / STEP, card_of(case, engine)) == 2
        if what == "other stage":
            publish(engine, folder / "recut" / folder_of(case), card_of(case, engine), keep=True)
        losses = steps(engine, range(2, 3))
        found[what] = {"losses": torch.tensor(losses), **full_state(engine)}
        if what in ("straight", "resumed"):
            moments = [value for state in inner_optimizer(engine.optimizer).state.values() for value in state.values()]
            found[what] |= {f"moment {number}": torch.as_tensor(value).clone() for number, value in enumerate(moments)}
        engine.close()
    return found


def full_disk(world, folder):
    """What the ranks say when the last one's disk is full, and the checkpoint that is there then."""
    case = RESUMED[0]
    engine = engine_of(case, case[1], world)
    publish(engine, folder, card_of(case, engine), keep=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        publish(engine, folder, replace(card_of(case, engine), step=3), keep=False)
        said = "nothing"
    except SaveError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    engine.close()
    found, _ = choose("auto", folder, world)
    return all_gather_object(world, said), [path.name for path in folder.glob("*step*")], found.name


def engine_of(case, stage, world):
    """The case's engine; one rank trains at stage 0."""
    method, _, optimizer = case
    # Two ranks see two batches for BatchNorm, where MoCo does not synchronise it.
    more = {"moco": {"bn_splits": 2 // world.size}}.get(method, {})
    return made(method, False, stage, world, optimizer=optimizer, lr=_LR[optimizer], **more)


def card_of(case, engine):
    """The card of its checkpoints."""
    return Card(case[0], False, "conv_small", case[2], 2, engine.world.size, engine.stage, "0", BATCH)


def other(stage):
    """A stage that keeps its shards in another way, or in other files."""
    return 2 if stage == 1 else 1


def folder_of(case):
    """The case's folder."""
    return "-".join(map(str, case))
