"""The step: forward, backward and update through DeepSpeed. The engine knows ranks and schedules, not methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.resolve import Config
from ..config.settings import TrainConfig
from ..distributed.world import World
from ..methods import Method
from ..methods.base import Objective, Step, checked
from ..models.batchnorm import synchronise
from ..optim.layerwise import LayerwiseOptimizer
from ..optim.optimizers import create_optimizer, parameter_groups, set_schedules
from ..optim.schedules import cosine, scaled_lr, warmup_cosine
from ..pipelines import Batch
from . import zero
from .clipping import clip_each_parameter, clip_whole_gradient
from .reduction import GradientReduction, message_type
from .rules import parameter_rules
from .seeds import seed_of
from .shards import find_shards


class Engine:
    """A method under DeepSpeed. A step is one ``micro_step`` and ``update`` per accumulated micro-batch."""

    def __init__(self, config: Config, method: Method, world: World, *, steps_per_epoch: int) -> None:
        train = config.train
        self.train, self.world = train, world
        self.device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = train.epochs * steps_per_epoch
        self.ahead = 0
        """Steps by which the schedules are ahead of the run's own count, see :class:`fasttrain.methods.base.Step`."""
        self.rows = train.batch_size_per_gpu * world.size
        """Images in a reduction over all ranks."""
        group = dist.group.WORLD
        if world.size > 1 and group is not None:
            method.group = group
            if method.synchronised_batch_norm:
                synchronise(method, group)
        self.stage = zero.stage_for(train, sum(p.numel() for p in method.parameters()), world, self.device)
        self.peak_lr = scaled_lr(train.lr, train.lr_scaling, global_batch(train, world))
        groups = parameter_groups(method.to(self.device), train.weight_decay, parameter_rules(method, train))
        optimizer = create_optimizer(train.optimizer, groups, lr=self.peak_lr, sharded=self.stage > 0)
        self.precision = precision(train, self.device)
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        self._linear = zero.linear_function()
        settings = zero.deepspeed_config(train, self.stage, self.precision, trained)
        self.deepspeed, self.optimizer = zero.wrap(method, optimizer, settings)
        self._reduction: GradientReduction | None = None
        if self.stage == 0 and world.size > 1:
            sent = message_type(self.precision, on_gpu=self.device.type == "cuda")
            self._reduction = GradientReduction(method.parameters(), world.size, sent)
        shards = find_shards(self.optimizer, self.stage, {p: name for name, p in method.named_parameters()})
        zero.share_weights(self.optimizer, self.stage)
        inner = zero.inner_optimizer(self.optimizer)
        if shards is not None and isinstance(inner, LayerwiseOptimizer):
            inner.shard(shards.layouts, shards.sum_over_ranks)
        if train.clip_each and train.clip_grad:
            clip_each_parameter(inner, train.clip_grad, shards)
        self.method: Method = self.deepspeed.module

    def step_at(self, index: int, *, measure: bool) -> Step:
        """Return the step that follows ``index`` finished steps."""
        return Step(index, self.total_steps, self.steps_per_epoch, measure, self.ahead)

    def position(self, done: int) -> tuple[int, int]:
        """Return the current epoch after ``done`` finished steps, and how many of its steps are finished."""
        return divmod(done + self.ahead, self.steps_per_epoch)

    def first_pass(self, batches: Iterable[Batch]) -> None:
        """Show every image to a method that must see all data before its first step."""
        for batch in batches:
            views, indices = self._on_device(batch)
            self.method.first_pass(views, indices)

    def start_epoch(self, epoch: int) -> None:
        """Start an epoch in the method. Its random draws are a function of the seed and the epoch."""
        torch.manual_seed(seed_of(self.train.seed, epoch))
        self.method.start_epoch()

    def micro_step(self, batch: Batch, step: Step, number: int = 0) -> Objective:
        """Run forward and backward of micro-batch ``number`` of a step."""
        # Random draws (stochastic depth, CMC's negatives) are a function of seed, step, rank and micro-batch, so a
        # resumed run draws the same. The first micro-batch draws the same as the step without accumulation.
        key = (self.train.seed, step.index, self.world.rank, *([number] if number else []))
        torch.manual_seed(seed_of(*key))
        self._set_schedules(step)
        views, indices = self._on_device(batch)
        objective = checked(self.deepspeed(views, replace(step, micro=number), indices), self.method)
        self.backward(objective.loss)
        return objective

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch. With a step's last one, they become the mean over the ranks."""
        averages = self._reduction is not None and self.deepspeed.is_gradient_accumulation_boundary()
        with self._reduction.during_backward() if self._reduction and averages else nullcontext():
            self.deepspeed.backward(loss)

    def update(self, step: Step, *, skip: bool = False, grad_norm: float | None = None) -> None:
        """Pass the micro-batch to DeepSpeed. After a step's last one the optimizer moves and the teacher follows.

        With ``skip`` neither moves, and the gradient is discarded. ``grad_norm`` is the norm of the whole gradient
        without the loss scale, if the caller has it.
        """
        last = self.deepspeed.is_gradient_accumulation_boundary()
        if last and not skip and zero.clips_itself(self.train, self.stage):
            gradients = [g for group in zero.group_gradients(self.optimizer, self.stage) for g in group]
            clip_whole_gradient(gradients, self.train.clip_grad, grad_norm, self.loss_scale)
        with zero.update_skipped(zero.inner_optimizer(self.optimizer)) if skip else nullcontext():
            self.deepspeed.step()
        if last and not skip:
            self.method.end_step(step)

    def _on_device(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        views = [view.to(self.device, non_blocking=True) for view in batch.views]
        return views, batch.indices.to(self.device, non_blocking=True)

    def schedules(self, step: Step) -> dict[str, float | None]:
        """Return the learning rate, the weight decay and the teacher's momentum at a step."""
        t = self.train
        warmup = min(t.warmup_epochs * self.steps_per_epoch, self.total_steps)
        # Warm-up counts the current step, so that the first learning rate is small but not 0.
        index = step.position + 1 if step.position < warmup else step.position
        if (t.lr_drops or t.constant_lr) and index >= warmup:
            lr = self.peak_lr * 0.1 ** sum(step.epoch >= drop for drop in t.lr_drops)
        else:
            lr = warmup_cosine(index, step.total, warmup, self.peak_lr, t.min_lr)
        return {
            "lr": lr,
            "weight_decay": cosine(step.position, step.total, t.weight_decay, t.weight_decay_end),
            "momentum": self.method.momentum(step),
        }

    def _set_schedules(self, step: Step) -> None:
        now = self.schedules(step)
        lr, weight_decay = now["lr"], now["weight_decay"]
        assert lr is not None
        assert weight_decay is not None
        for group in self.optimizer.param_groups:
            set_schedules(group, lr=lr, peak_lr=self.peak_lr, weight_decay=weight_decay, epoch=step.epoch)

    @property
    def loss_scale(self) -> float:
        """The current factor of the gradient: 1, except for fp16, which searches for it."""
        scaler = zero.gradient_scaler(self.deepspeed)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each number over the ranks. Collective."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world.size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
            tensor /= self.world.size
        return [float(v) for v in tensor]

    @torch.no_grad()
    def finite(self) -> bool:
        """Return whether every trained weight is finite on every rank. Collective."""
        trained = [p for p in self.method.parameters() if p.requires_grad]
        shards = [p if (shard := zero.local_shard(p)) is None else shard for p in trained]
        finite = torch.stack([shard.data.isfinite().all() for shard in shards if shard.numel()]).all()
        return self.mean([float(finite)])[0] == 1

    def close(self) -> None:
        """Free DeepSpeed's state and restore torch's linear function, which DeepSpeed replaces at stage 3."""
        if self._reduction:
            self._reduction.close()
        self.deepspeed.destroy()
        zero.set_linear_function(self._linear)


def global_batch(train: TrainConfig, world: World) -> int:
    """Return the images per optimizer step, over all ranks and micro-batches."""
    return train.batch_size_per_gpu * world.size * train.gradient_accumulation_steps


def precision(train: TrainConfig, device: torch.device) -> str:
    """Return ``--precision``, with ``auto`` resolved: bf16 on a GPU that supports it, else fp32.

    Most CPUs compute bf16 products 5 times slower than fp32.
    """
    if train.precision != "auto":
        return train.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
