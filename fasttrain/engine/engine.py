"""The step: forward, backward and update through DeepSpeed. Knows ranks and schedules, not methods."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ..config.resolve import Config
from ..config.settings import TrainConfig
from ..distributed.world import World
from ..errors import ConfigError
from ..methods import Method
from ..methods.base import Objective, Step
from ..models.batchnorm import synchronise
from ..optim.layerwise import LayerwiseOptimizer
from ..optim.optimizers import Role, create_optimizer, parameter_groups
from ..optim.schedules import cosine, warmup_cosine
from ..pipelines import Batch
from .clipping import clip_each_parameter
from .shards import find_shards, held_back, inner, share_weights

# Bytes of model state a parameter that every rank has, and that ranks share: fp32 weight, gradient, two Adam moments,
# teacher; and at stages 1 and 2 the weights a second time, of which DeepSpeed's optimizer has its shard.
_STATE_BYTES = {0: (20, 0), 1: (12, 12), 2: (8, 16), 3: (0, 20)}
_BUCKET = 500_000_000  # elements that are reduced at once, at most: DeepSpeed's default


class Engine:
    """A method under DeepSpeed. ``micro_step`` as often as gradients accumulate, then ``update``."""

    def __init__(self, config: Config, method: Method, world: World, *, steps_per_epoch: int) -> None:
        train = config.train
        self.train, self.world = train, world
        self.device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = train.epochs * steps_per_epoch
        self.rows = train.batch_size_per_gpu * world.size  # images that a reduction over all ranks sees
        everyone = dist.group.WORLD
        if world.size > 1 and everyone is not None:
            method.group = everyone
            if method.synchronised_batch_norm:
                synchronise(method, everyone)
        stage = zero_stage(train, sum(p.numel() for p in method.parameters()), world, self.device)
        self.peak_lr = train.lr * global_batch(train, world) / 256
        groups = parameter_groups(
            method.to(self.device),
            train.weight_decay,
            decay_all=train.decay_all,
            constant_lr=method.constant_lr_modules,
        )
        optimizer = create_optimizer(train.optimizer, groups, lr=self.peak_lr, sharded=stage > 0)
        self.precision = precision(train, self.device)
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        self._linear = vars(functional)["linear"]
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=method, optimizer=optimizer, config=deepspeed_config(train, stage, self.precision, trained)
        )
        if world.size == 1 and stage == 0:
            self.deepspeed.enable_backward_allreduce = False  # it would flatten and copy every gradient for nobody
        share_weights(self.optimizer, stage)
        shards = find_shards(self.optimizer, stage) if needs_norms(train) else None
        stepped = inner(self.optimizer)
        if shards is not None and isinstance(stepped, LayerwiseOptimizer):
            stepped.shard(shards.layouts, shards.sum_over_ranks)
        if train.clip_each and train.clip_grad:
            clip_each_parameter(stepped, train.clip_grad, shards)
        self.method: Method = self.deepspeed.module
        self.stage = stage

    def step_at(self, index: int, *, measure: bool) -> Step:
        """The step that follows ``index`` finished ones."""
        return Step(index, self.total_steps, self.steps_per_epoch, measure)

    def first_pass(self, batches: Iterable[Batch]) -> None:
        """Show every image to a method that asks for it before its first step."""
        for batch in batches:
            views, indices = self._on_device(batch)
            self.method.first_pass(views, indices)

    def start_epoch(self, epoch: int) -> None:
        """Tell the method that an epoch begins; what it draws is a function of seed and epoch."""
        torch.manual_seed(hash((self.train.seed, epoch)) % 2**63)
        self.method.start_epoch()

    def micro_step(self, batch: Batch, step: Step, number: int = 0) -> Objective:
        """Forward and backward of the micro-batch of this ``number`` in its step."""
        # Whatever torch draws (stochastic depth, CMC's negatives) is a function of seed, step, micro-batch and rank, so
        # a resumed run draws the same; the first micro-batch draws what the whole step draws without accumulation.
        key = (self.train.seed, step.index, self.world.rank, *([number] if number else []))
        torch.manual_seed(hash(key) % 2**63)
        self._set_schedules(step)
        views, indices = self._on_device(batch)
        objective: Objective = self.deepspeed(views, step, indices)
        self.deepspeed.backward(objective.loss)
        return objective

    def update(self, step: Step, *, skip: bool = False) -> None:
        """Hand the micro-batch to DeepSpeed; after a step's last one the optimizer moves and the teacher follows.

        With ``skip`` neither does, and the gradient is forgotten.
        """
        last = self.deepspeed.is_gradient_accumulation_boundary()
        with held_back(inner(self.optimizer)) if skip else nullcontext():
            self.deepspeed.step()
        if last and not skip:
            self.method.end_step(step)

    def _on_device(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        views = [view.to(self.device, non_blocking=True) for view in batch.views]
        return views, batch.indices.to(self.device, non_blocking=True)

    def schedules(self, step: Step) -> dict[str, float | None]:
        """Learning rate, weight decay and the teacher's momentum at a step."""
        t = self.train
        warmup = min(t.warmup_epochs * self.steps_per_epoch, self.total_steps)
        # The step that is about to be made counts: with warm-up the very first is small, but not nothing.
        index = step.index + 1 if step.index < warmup else step.index
        if t.lr_drops and index >= warmup:
            lr = self.peak_lr * 0.1 ** sum(step.epoch >= drop for drop in t.lr_drops)
        else:
            lr = warmup_cosine(index, step.total, warmup, self.peak_lr, t.min_lr)
        return {
            "lr": lr,
            "weight_decay": cosine(step.index, step.total, t.weight_decay, t.weight_decay_end),
            "momentum": self.method.momentum(step),
        }

    def _set_schedules(self, step: Step) -> None:
        now = self.schedules(step)
        for group in self.optimizer.param_groups:
            role = Role(group["name"])
            frozen = role is Role.PROTOTYPES and step.epoch < self.method.frozen_prototype_epochs
            # A learning rate of 0 freezes under every ZeRO stage; clearing .grad, as DINO does, would not.
            group["lr"] = 0.0 if frozen else self.peak_lr if role.constant_lr else now["lr"]
            if role.decays:
                group["weight_decay"] = now["weight_decay"]

    @property
    def loss_scale(self) -> float:
        """By what the gradient is multiplied at the moment: 1, but for fp16, which tries."""
        scaler = self.deepspeed.torch_autocast_z0_gradscaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def mean(self, values: Sequence[float]) -> list[float]:
        """Mean of some numbers over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world.size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
            tensor /= self.world.size
        return [float(v) for v in tensor]

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether every trained weight is a number, on every rank."""
        held = [getattr(p, "ds_tensor", p) for p in self.method.parameters() if p.requires_grad]
        good = torch.stack([t.data.isfinite().all() for t in held if t.numel()]).all()
        return self.mean([float(good)])[0] == 1

    def close(self) -> None:
        """Free DeepSpeed's state, and give torch its linear layer back, which it replaces at ZeRO-3 for good."""
        self.deepspeed.destroy()
        vars(functional)["linear"] = self._linear


def needs_norms(train: TrainConfig) -> bool:
    """Whether something takes the norms of whole parameters, which shards alone do not have."""
    return train.optimizer in ("lars", "lamb") or train.clip_each


def global_batch(train: TrainConfig, world: World) -> int:
    """Images an optimizer step."""
    return train.batch_size_per_gpu * world.size * train.gradient_accumulation_steps


def precision(train: TrainConfig, device: torch.device) -> str:
    """What ``auto`` means here: bf16 where a GPU has it, else fp32: most CPUs do bf16 products 5 times slower."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def zero_stage(train: TrainConfig, parameters: int, world: World, device: torch.device) -> int:
    """The stage asked for, or the lowest whose model state takes at most half of the rank's memory.

    Raises ConfigError for fp16 on shards.
    """
    stage: int
    least = least_stage(train)
    if train.zero_stage is not None:
        stage = train.zero_stage
    elif world.size == 1:
        stage = least
    else:
        memory = _memory(device) / (1 if device.type == "cuda" else world.local_size)
        needs = {s: parameters * (whole + sharded / world.size) for s, (whole, sharded) in _STATE_BYTES.items()}
        stage = next((s for s, need in needs.items() if s >= least and need <= memory / 2), 3)
    if stage and train.precision == "fp16":
        # DeepSpeed 0.19.8 clips the gradient, scaled for fp16 as it is, to --clip_grad, and then takes the scale off:
        # what is left is 65536 times too short.
        raise ConfigError(
            f"--precision fp16 cannot be used with --zero_stage {stage}, where DeepSpeed clips gradients before it "
            "unscales them; use --precision bf16 or --zero_stage 0"
        )
    return stage


def least_stage(train: TrainConfig) -> int:
    """The lowest stage that can do what is asked for."""
    return 1 if train.offload_optimizer or train.overlap_comm else 0


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return int(psutil.virtual_memory().total)


def deepspeed_config(train: TrainConfig, stage: int, precision: str, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a network of ``trained`` elements that the optimizer moves.

    Weights, gradients and averages are fp32 at every precision; autocast lowers the products only.
    """
    overlap = stage == 3 if train.overlap_comm is None else train.overlap_comm
    # DeepSpeed sets buckets aside whole, 2 GB of fp32 for the smallest network, and reduces a bucket when it is full:
    # one that holds all gradients would leave nothing of the backward pass to reduce beside.
    bucket = min(_BUCKET, max(trained // 8, 1) if overlap else trained)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": overlap}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.batch_size_per_gpu,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": 0.0 if train.clip_each else train.clip_grad,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": zero,
        # torch's fused AdamW and SGD work on flat shards as they do on tensors; LARS and LAMB know what is in theirs.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision]}
    return config


def quiet_deepspeed() -> None:
    """Let DeepSpeed speak only when something is wrong."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
