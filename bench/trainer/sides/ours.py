"""Our side: the Loader, and the Engine in the loop of ``fasttrain.training.trainer``."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.config.resolve import Config
from fasttrain.distributed.world import World, initialise
from fasttrain.engine.build import build_method
from fasttrain.engine.engine import Engine
from fasttrain.engine.zero import quiet_deepspeed
from fasttrain.methods.branch import slice_views
from fasttrain.pipelines import Batch, Loader, open_source
from fasttrain.training.records import Recorder
from fasttrain.training.trackers import open_trackers

from .clock import Side


class Ours(Side):
    def __init__(self, config: Config) -> None:
        quiet_deepspeed()
        t, world = config.train, World.from_environment()
        initialise(world)
        source = open_source(t.data_path).train
        self.loader = Loader(source, config.views, t.batch_size_per_gpu, threads=t.num_workers or world.threads)
        torch.manual_seed(t.seed)
        self.engine = Engine(
            config,
            build_method(config, images=len(source), world_size=1),
            world,
            steps_per_epoch=self.loader.steps_per_epoch,
        )
        self.method = self.engine.method
        self.parameters = sum(p.numel() for p in self.method.student.parameters())
        self.watch(self.engine.optimizer)
        self.log_every = t.log_every
        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        output = Path(folder.name)
        self.recorder = Recorder(output, trackers=open_trackers(["tensorboard"], output, "", 0))
        self.epoch = 0
        self.index = self.loader.steps_per_epoch * int(t.warmup_epochs + 1)  # past warm-up and frozen prototypes
        self.cached: Batch | None = None
        self.gradient: Tensor | None = None

    def batches(self) -> Iterator[Batch]:
        self.epoch += 1
        return self.loader.epoch(self.epoch)

    def keep(self, batch: Batch) -> None:
        self.cached = batch

    def network(self) -> None:
        assert self.cached is not None
        views = list(self.cached.views)
        if self.method.teacher is not None:
            with torch.no_grad():
                _logits(self.method.teacher, slice_views(views, 0, self.method.n_global))
        logits = _logits(self.method.student, views)
        if self.gradient is None:
            self.gradient = torch.randn_like(logits) / logits.numel()
        logits.backward(self.gradient)
        self.method.zero_grad()

    def step(self, batch: Batch | None = None, *, log: bool) -> None:
        engine = self.engine
        batch = self.cached if batch is None else batch
        assert batch is not None
        step = engine.step_at(self.index, measure=log)
        objective = engine.micro_step(batch, step)
        engine.update(step)
        self.index += 1
        if log:
            bound: Any = objective.bound
            local = [float(objective.loss.detach()), float(bound.entropy), float(bound.reconstruction)]
            loss, entropy, reconstruction = engine.mean(local)
            line = {"step": self.index, "loss": loss, "entropy": entropy, "reconstruction": reconstruction}
            self.recorder.step(line | engine.schedules(step))


def _logits(branch: Any, views: list[Tensor]) -> Tensor:
    """Return the input of the loss: projections, or their products with the prototypes if the method has prototypes."""
    projections: Tensor = branch(views)
    return projections @ branch.prototypes().T if hasattr(branch, "prototypes") else projections
