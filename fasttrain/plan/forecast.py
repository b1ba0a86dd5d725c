"""From a configuration and a cluster to what the run will need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import methods
from ..config.resolve import Config
from ..config.settings import TrainConfig
from ..engine.build import build_method
from ..engine.zero import least_stage
from ..errors import ConfigError
from .communication import Traffic, traffic
from .hardware import GIB, Cluster
from .memory import Part, largest_batch, parts, total
from .step_time import StepTime, step_time
from .trace import Trace, trace
from .update import trace_update
from .weights import Weight, weights_of, zero_of


@dataclass(frozen=True)
class Stage:
    """What the run needs at a ZeRO stage."""

    stage: int
    parts: tuple[Part, ...]
    traffic: tuple[Traffic, ...]
    time: StepTime
    largest_batch: int
    """Images a GPU and micro-step that fit, 0 for none."""

    @property
    def bytes(self) -> int:
        """What a GPU must hold."""
        return total(self.parts)


@dataclass(frozen=True)
class Forecast:
    """A run on a cluster."""

    config: Config
    cluster: Cluster
    precision: str
    images: int
    """Of an epoch, as the data has them."""
    weights: tuple[Weight, ...]
    buffers: dict[str, int]
    """Bytes by name."""
    synchronised: bool
    """Whether BatchNorm sees all ranks."""
    can_recompute: bool
    """Whether --activation_checkpointing is there to be tried."""
    bucket: int
    """Elements of ZeRO's buckets."""
    flops: int
    """Operations of a micro-step, forward and backward."""
    stages: tuple[Stage, ...]
    chosen: Stage | None
    """The stage asked for, or the lowest that fits; None if none does."""

    @property
    def global_batch(self) -> int:
        """Images of an optimizer step."""
        t = self.config.train
        return t.batch_size_per_gpu * t.gradient_accumulation_steps * self.cluster.world

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole recipe."""
        t = self.config.train
        micro_steps = self.images // (t.batch_size_per_gpu * self.cluster.world)
        return t.epochs * (micro_steps // t.gradient_accumulation_steps)

    def fits(self, stage: Stage) -> bool:
        """Whether a GPU holds what the stage needs."""
        return stage.bytes <= self.cluster.usable

    def hours(self, stage: Stage) -> float:
        """From the first step to the last, evaluation and checkpoints not counted."""
        return self.steps * stage.time.total / 3600


def forecast(config: Config, cluster: Cluster, images: int) -> Forecast:
    """Count one step of the run and work out the rest.

    Raises ConfigError for what :func:`build_method` refuses, a batch larger than the data, fp16 on shards, or one image
    a GPU where BatchNorm needs two.
    """
    t, world = config.train, cluster.world
    precision = "bf16" if t.precision == "auto" else t.precision
    largest = images // (world * t.gradient_accumulation_steps)
    if t.batch_size_per_gpu > largest:
        raise ConfigError(
            f"a batch of {t.batch_size_per_gpu * world * t.gradient_accumulation_steps} images is larger than the data "
            f"({images}); lower --batch_size_per_gpu or --nodes"
        )
    if t.zero_stage and precision == "fp16":
        raise ConfigError("--precision fp16 is for --zero_stage 0 only; use --precision bf16")
    with torch.device("meta"):
        method = build_method(config, images=images, world_size=world)
    weights = weights_of(method, t, precision)
    buffers = {name: buffer.nbytes for name, buffer in method.named_buffers()}
    held = sum(buffers.values()) + method.bytes_between_epochs(config.settings, images)
    update = trace_update(method, t, world=world)

    def needs(of: Trace, stage: int) -> tuple[Part, ...]:
        zero = zero_of(t, stage, world, precision, weights)
        return parts(weights, held, of, update, zero, accumulation=t.gradient_accumulation_steps)

    def traces(stage: int) -> tuple[Trace, Trace]:
        """A step as it is asked for, and one whose batch is about the largest that fits."""
        try:
            one = trace(method, config.views, t.batch_size_per_gpu, precision=precision, world=world, stage=stage)
        except ValueError as error:
            if t.batch_size_per_gpu > 1:
                raise
            raise ConfigError(f"one image a GPU cannot be planned ({error}); raise --batch_size_per_gpu") from None
        batch = _about_the_largest(one, total(needs(one, stage)), cluster.usable)
        return one, trace(method, config.views, batch, precision=precision, world=world, stage=stage)

    def at(stage: int, one: Trace, two: Trace) -> Stage:
        zero = zero_of(t, stage, world, precision, weights)
        times = t.gradient_accumulation_steps
        sent = traffic(weights, one, update, zero, accumulation=times)
        seconds = step_time(weights, one, update, sent, zero, cluster, precision=precision, accumulation=times)
        asked = needs(one, stage)
        fits = min(largest_batch(asked, one.batch, needs(two, stage), two.batch, cluster.usable), largest)
        accepted = next((batch for batch in range(fits, 0, -1) if _accepts(config, batch * world)), 0)
        return Stage(stage, asked, sent, seconds, accepted)

    below = traces(0)  # the same at stages 0 to 2
    stages = [at(0, *below)]
    if precision != "fp16":
        stages += [at(1, *below), at(2, *below), at(3, *traces(3))]
    synchronised = method.synchronised_batch_norm and any(isinstance(m, _BatchNorm) for m in method.modules())
    return Forecast(
        config,
        cluster,
        precision,
        images,
        weights,
        buffers,
        synchronised,
        not t.activation_checkpointing and _can_recompute(method.backbone),
        zero_of(t, 1, world, precision, weights).bucket,
        below[0].flops,
        tuple(stages),
        _choice(stages, t, cluster),
    )


def _about_the_largest(one: Trace, needed: int, usable: float) -> int:
    """A batch that about fills the memory, if what a batch takes were in proportion to it; another than it has.

    Two images at least: of one, a head's BatchNorm refuses to take statistics.
    """
    an_image = (one.kept + one.kept_by_loss + one.temporary + one.inputs) / one.batch
    batch = max(int(one.batch + (usable - needed) / an_image), 2)
    return batch if batch != one.batch else batch + 1


def _choice(stages: Sequence[Stage], train: TrainConfig, cluster: Cluster) -> Stage | None:
    """The stage asked for, or the lowest of those that the engine chooses from; None if it does not fit."""
    if train.zero_stage is not None:
        candidates = [stage for stage in stages if stage.stage == train.zero_stage]
    else:
        candidates = list(stages[least_stage(train) :][: 1 if cluster.world == 1 else None])
    return next((stage for stage in candidates if stage.bytes <= cluster.usable), None)


def refusal(found: Forecast) -> str:
    """One line for a run that fits at none of the stages it may have: what it needs, and what would help."""
    t, gpu = found.config.train, found.cluster.gpu
    asked = [stage for stage in found.stages if t.zero_stage in (None, stage.stage)]
    best = min(asked, key=lambda stage: stage.bytes)
    line = (
        f"{t.arch} with {t.batch_size_per_gpu} images a GPU needs {best.bytes / GIB:.1f} GiB at --zero_stage "
        f"{best.stage}, and {gpu.name} has {found.cluster.usable / GIB:.1f} to give"
    )
    other = next((stage for stage in found.stages if stage.bytes <= found.cluster.usable), None)
    most = max(found.stages, key=lambda stage: stage.largest_batch)
    if other is not None:
        helps = [f"--zero_stage {other.stage} fits"]
    elif most.largest_batch:
        helps = [f"--zero_stage {most.stage} --batch_size_per_gpu {most.largest_batch} fits"]
    else:
        helps = ["nor does one image fit; take more GPUs (--nodes), a GPU with more memory, or a smaller --arch"]
    if other is None and found.can_recompute:
        helps.append("--activation_checkpointing takes less")
    return "; ".join([line, *helps])


def _can_recompute(backbone: nn.Module) -> bool:
    """Whether ``networks.checkpoint_activations`` takes the network."""
    batch_norm = any(isinstance(layer, _BatchNorm) for layer in backbone.modules())
    return hasattr(backbone, "set_grad_checkpointing") and not batch_norm


def _accepts(config: Config, batch: int) -> bool:
    """Return whether the method can be trained with ``batch`` images per micro-batch over all ranks."""
    try:
        methods.load(config.method).check(config.settings, batch)
    except ValueError:
        return False
    return True
