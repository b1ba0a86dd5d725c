"""An engine to save and restore, and checkpoints of nothing but a card."""

import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from fasttrain.checkpoint.store import Card
from fasttrain.config.resolve import resolve
from fasttrain.distributed.world import initialise, world_from_environment
from fasttrain.engine.build import build_method
from fasttrain.engine.engine import Engine
from fasttrain.pipelines import Batch

CARD = Card("simclr", False, "conv_small", "adamw", 0, 1, 0, "0")


@contextmanager
def small_engine():
    """SimCLR's conv_small, at ZeRO 0 on one rank."""
    world = world_from_environment()
    initialise(world)
    config = resolve("simclr", {"recipe": "cifar", "batch_size_per_gpu": 4, "hidden_dim": 16, "out_dim": 8})
    made = Engine(config, build_method(config, images=32, world_size=1), world, steps_per_epoch=4)
    yield made
    made.close()


def train(engine, steps):
    generator = torch.Generator().manual_seed(0)
    for index in range(steps):
        step = engine.step_at(index, measure=False)
        views = torch.randn(2, 4, 3, 32, 32, generator=generator)
        engine.micro_step(Batch((views,), None, torch.arange(4)), step)
        engine.update(step)


def state_of(engine):
    """Weights, and what the optimizer keeps of every parameter."""
    moments = engine.optimizer.state.values()
    found = list(engine.method.state_dict().values()) + [value for one in moments for value in one.values()]
    return [torch.as_tensor(value).clone() for value in found]


def write_card(folder, step, **changes):
    """A checkpoint folder with a card and nothing else."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "fasttrain.json").write_text(json.dumps({**asdict(replace(CARD, step=step)), "keep": False, **changes}))
    return path
