"""Engines to save and restore, and checkpoints that consist of a card only."""

import json
import os
import resource
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from fasttrain.checkpoint.card import Card, tag
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
    """Make the steps with these numbers, the same ones in every engine of a method, and return their losses."""
    losses, batch = [], engine.train.batch_size_per_gpu
    for index in indices:
        if index == 0 and engine.method.needs_first_pass:
            engine.first_pass(_batch(engine, number) for number in range(32 // batch))
        if index % 4 == 0:
            engine.start_epoch(index // 4)
        step = engine.step_at(index, measure=True)
        losses.append(engine.micro_step(_batch(engine, index), step).loss.item())
        engine.update(step)
    return losses


def _batch(engine, index):
    generator, batch, views = torch.Generator().manual_seed(1 + index), engine.train.batch_size_per_gpu, engine.views
    shapes = [(count, batch, views.channels, size, size) for size, count in views.groups]
    numbers = torch.arange(batch) + index * batch % 32
    return Batch(tuple(torch.randn(shape, generator=generator) for shape in shapes), None, numbers)


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
