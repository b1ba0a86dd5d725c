"""Engines to save and restore, and checkpoints that consist of a card only."""

import json
import os
import resource
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from fasttrain.checkpoint.card import Card, tag
from fasttrain.checkpoint.store import Publisher
from fasttrain.config.resolve import resolve
from fasttrain.distributed.world import World, initialise
from fasttrain.engine.build import build_method
from fasttrain.engine.engine import Engine
from fasttrain.pipelines import Batch

CARD = Card("simclr", False, "conv_small", "adamw", 0, 1, 0, "0")


@contextmanager
def small_engine(method="simclr", *, seed=0, images=32, **values):
    """Yield the engine of a small network on one rank. SimCLR's conv_small at ZeRO 0 is the default."""
    world = World(0, 1, 0, 1)
    initialise(world)
    small = {"hidden_dim": 16, "out_dim": 8} if method == "simclr" else {}
    config = resolve(method, {"recipe": "cifar", "batch_size_per_gpu": 4, **small, **values})
    torch.manual_seed(seed)
    engine = Engine(config, build_method(config, images=images, world_size=1), world, steps_per_epoch=4)
    engine.views = config.views
    yield engine
    engine.close()


def train(engine, indices):
    """Make the steps with these numbers and return their losses and bounds, or logs, as means over the ranks.

    Step k has the same global batch in every engine of a method, on any number of ranks. The data set has 4 batches.
    """
    losses = []
    for index in indices:
        if index == 0 and engine.method.needs_first_pass:
            engine.first_pass(_batch(engine, number) for number in range(4))
        if index % engine.steps_per_epoch == 0:
            engine.start_epoch(index // engine.steps_per_epoch)
        step = engine.step_at(index, measure=True)
        objective = engine.micro_step(_batch(engine, index), step)
        engine.update(step)
        bound = objective.bound
        terms = objective.logs.values() if bound is None else (bound.entropy, bound.reconstruction)
        losses.append(engine.mean([objective.loss.item(), *(term.item() for term in terms)]))
    return losses


def _batch(engine, index):
    """Return this rank's part of a global batch."""
    generator, views, world = torch.Generator().manual_seed(1 + index), engine.views, engine.world
    size = engine.train.batch_size_per_gpu * world.size
    groups = [torch.randn(n, size, views.channels, d, d, generator=generator) for d, n in views.groups]
    numbers = torch.arange(size) + index % 4 * size
    return Batch(
        tuple(group.chunk(world.size, dim=1)[world.rank] for group in groups),
        None,
        numbers.chunk(world.size)[world.rank],
    )


def publish(engine, folder, card, *, keep, newest=None):
    """Publish a checkpoint, and wait for it."""
    publisher = Publisher(engine, folder, newest=newest, note=print)
    publisher.publish(card, keep=keep)
    publisher.wait()


def state_of(engine):
    """Return copies of the weights and of the optimizer's state."""
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    return [torch.as_tensor(value).clone() for value in [*engine.method.state_dict().values(), *states]]


def same(one, other):
    """Return whether two lists of tensors are equal to the last bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def card_of(engine, method="simclr", step=1, **changes):
    """Return the card of an engine's checkpoint."""
    optimizer, stage, batch = engine.train.optimizer, engine.stage, engine.train.batch_size_per_gpu
    return replace(Card(method, False, "conv_small", optimizer, step, 1, stage, "0", batch), **changes)


def write_card(folder, step, **changes):
    """Return a checkpoint folder with a card and nothing else."""
    path = folder / tag(step)
    path.mkdir(parents=True)
    (path / "fasttrain.json").write_text(json.dumps({**asdict(replace(CARD, step=step)), "keep": False, **changes}))
    return path


class RunsCode:
    """An object whose unpickling creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@contextmanager
def largest_file(size):
    """Limit the size of files that this process can write, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
