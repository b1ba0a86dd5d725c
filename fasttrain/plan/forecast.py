"""Forecast a run from its configuration and the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .. import methods
from ..config.fit import fit_to_data
from ..config.resolve import Config
from ..config.settings import TrainConfig
from ..engine.build import build_method
from ..engine.zero import least_stage
from ..errors import ConfigError
from ..models.batchnorm import has_batch_norm
from .communication import Traffic, traffic
from .hardware import GIB, Cluster
from .memory import Part, largest_batch, parts, total
from .pauses import Pauses, evaluation_time, pauses
from .step_time import StepTime, step_time
from .trace import Trace, trace
from .update import trace_update
from .weights import Weight, weights_of, zero_of

_TIE = 1.03
"""Two steps are equally fast if their times differ by less than this factor."""


@dataclass(frozen=True)
class Stage:
    """The needs of the run at a ZeRO stage."""

    stage: int
    parts: tuple[Part, ...]
    traffic: tuple[Traffic, ...]
    time: StepTime
    pauses: Pauses
    largest_batch: int
    """Largest number of images per GPU and micro-step that fits, or 0."""

    @property
    def bytes(self) -> int:
        """Memory per GPU."""
        return total(self.parts)


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run on a cluster."""

    config: Config
    cluster: Cluster
    precision: str
    images: int
    """Images of the data set."""
    weights: tuple[Weight, ...]
    buffers: dict[str, int]
    """Bytes by name."""
    synchronised: bool
    """Whether BatchNorm's statistics are over all ranks."""
    can_recompute: bool
    """Whether --activation_checkpointing is available and off."""
    bucket: int
    """Elements per bucket of ZeRO."""
    flops: int
    """Floating-point operations of a micro-step, forward and backward."""
    stages: tuple[Stage, ...]
    chosen: Stage | None
    """The stage of --zero_stage, or the fastest stage that fits; None if none fits."""

    @property
    def global_batch(self) -> int:
        """Images per optimizer step."""
        t = self.config.train
        return t.batch_size_per_gpu * t.gradient_accumulation_steps * self.cluster.world

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return _steps(self.config.train, self.images, self.cluster.world)

    def fits(self, stage: Stage) -> bool:
        """Return whether a GPU has enough memory for the stage."""
        return stage.bytes <= self.cluster.usable

    def hours(self, stage: Stage) -> float:
        """Return the hours of all steps, evaluations and copies of checkpoints."""
        return (self.steps * stage.time.total + stage.pauses.total) / 3600


def _steps(train: TrainConfig, images: int, world: int) -> int:
    micro_steps = images // (train.batch_size_per_gpu * world)
    return train.epochs * (micro_steps // train.gradient_accumulation_steps)


def forecast(config: Config, cluster: Cluster, images: int) -> Forecast:
    """Trace one step of the run and derive the forecast from it.

    Raise ConfigError for a configuration that :func:`build_method` refuses, for a batch larger than the data, for fp16
    with a ZeRO stage, and for one image per GPU if BatchNorm needs two.
    """
    config = fit_to_data(config, images).config
    t, world = config.train, cluster.world
    precision = "bf16" if t.precision == "auto" else t.precision
    largest = images // (world * t.gradient_accumulation_steps)
    if t.batch_size_per_gpu > largest:
        batch = t.batch_size_per_gpu * world * t.gradient_accumulation_steps
        raise ConfigError(
            f"--batch_size_per_gpu: a step of {batch} images is larger than the data ({images}). Lower it or --nodes."
        )
    if t.zero_stage and precision == "fp16":
        raise ConfigError(f"--precision: fp16 works at --zero_stage 0 only, got {t.zero_stage}. Use --precision bf16.")
    with torch.device("meta"):
        method = build_method(config, images=images, world_size=world)
    weights = weights_of(method, t, precision)
    buffers = {name: buffer.nbytes for name, buffer in method.named_buffers()}
    method_bytes = sum(buffers.values()) + method.bytes_between_epochs(config.settings, images)
    update = trace_update(method, t, world=world)
    evaluation = evaluation_time(method, config, cluster, images)

    def needs(traced: Trace, stage: int) -> tuple[Part, ...]:
        zero = zero_of(t, stage, world, precision, weights)
        return parts(weights, method_bytes, traced, update, zero, accumulation=t.gradient_accumulation_steps)

    def traces(stage: int) -> tuple[Trace, Trace]:
        """Return a step with the configured batch, and a step with about the largest batch that fits."""
        try:
            one = trace(method, config.views, t.batch_size_per_gpu, precision=precision, world=world, stage=stage)
        except ValueError as error:
            if t.batch_size_per_gpu > 1:
                raise
            raise ConfigError(f"--batch_size_per_gpu: 1 cannot be planned ({error}). Raise it.") from None
        batch = _estimated_batch(one, total(needs(one, stage)), cluster.usable)
        return one, trace(method, config.views, batch, precision=precision, world=world, stage=stage)

    def at(stage: int, one: Trace, two: Trace) -> Stage:
        zero = zero_of(t, stage, world, precision, weights)
        times = t.gradient_accumulation_steps
        sent = traffic(weights, one, update, zero, accumulation=times)
        seconds = step_time(weights, one, update, sent, zero, cluster, precision=precision, accumulation=times)
        memory = needs(one, stage)
        fits = min(largest_batch(memory, one.batch, needs(two, stage), two.batch, cluster.usable), largest)
        accepted = next((batch for batch in range(fits, 0, -1) if _accepts(config, batch * world)), 0)
        between = pauses(evaluation, memory, config, cluster, _steps(t, images, world))
        return Stage(stage, memory, sent, seconds, between, accepted)

    unsharded = traces(0)  # the same at stages 0 to 2
    stages = [at(0, *unsharded)]
    if precision != "fp16":
        stages += [at(1, *unsharded), at(2, *unsharded), at(3, *traces(3))]
    synchronised = method.synchronised_batch_norm and has_batch_norm(method)
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
        unsharded[0].flops,
        tuple(stages),
        _choice(stages, t, cluster),
    )


def _estimated_batch(one: Trace, needed: int, usable: float) -> int:
    """Return about the largest batch that fits, if memory is proportional to it; never the traced batch itself.

    It has at least two images, because a head's BatchNorm needs them.
    """
    per_image = (one.kept + one.kept_by_loss + one.temporary + one.inputs) / one.batch
    batch = max(int(one.batch + (usable - needed) / per_image), 2)
    return batch if batch != one.batch else batch + 1


def _choice(stages: Sequence[Stage], train: TrainConfig, cluster: Cluster) -> Stage | None:
    """Return the stage of --zero_stage, or the fastest stage that fits; None if none fits.

    Of stages whose steps differ by less than 3 %, the lowest is returned, because the forecast is no more exact.
    """
    if train.zero_stage is not None:
        candidates = [stage for stage in stages if stage.stage == train.zero_stage]
    else:
        candidates = list(stages[least_stage(train) :][: 1 if cluster.world == 1 else None])
    fitting = [stage for stage in candidates if stage.bytes <= cluster.usable]
    fastest = min((stage.time.total for stage in fitting), default=0.0)
    return next((stage for stage in fitting if stage.time.total <= fastest * _TIE), None)


def refusal(prediction: Forecast) -> str:
    """Return one line for a run that does not fit: the memory it needs, and changes that help."""
    t, cluster = prediction.config.train, prediction.cluster
    allowed = [stage for stage in prediction.stages if t.zero_stage in (None, stage.stage)]
    best = min(allowed, key=lambda stage: stage.bytes)
    problem = (
        f"--gpu {cluster.gpu.name}: {t.arch} with {t.batch_size_per_gpu} images per GPU needs "
        f"{best.bytes / GIB:.1f} GiB at --zero_stage {best.stage}, got {cluster.usable / GIB:.1f} usable."
    )
    other = next((stage for stage in prediction.stages if stage.bytes <= cluster.usable), None)
    most = max(prediction.stages, key=lambda stage: stage.largest_batch)
    if other is not None:
        return f"{problem} Use --zero_stage {other.stage}."
    if most.largest_batch:
        fix = f"Use --zero_stage {most.stage} --batch_size_per_gpu {most.largest_batch}."
    else:
        fix = "One image does not fit either. Use more GPUs (--nodes), a GPU with more memory, or a smaller --arch."
    recompute = " --activation_checkpointing needs less memory." if prediction.can_recompute else ""
    return f"{problem} {fix}{recompute}"


def _can_recompute(backbone: nn.Module) -> bool:
    """Return whether ``models.architectures.checkpoint_activations`` accepts the network."""
    return hasattr(backbone, "set_grad_checkpointing") and not has_batch_norm(backbone)


def _accepts(config: Config, batch: int) -> bool:
    """Return whether the method can be trained with ``batch`` images per micro-batch over all ranks."""
    try:
        methods.load(config.method).check(config.settings, batch)
    except ValueError:
        return False
    return True
