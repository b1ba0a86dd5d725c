"""The weights of a method and the ZeRO settings that decide where they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..config.settings import TrainConfig
from ..engine.reduction import BUCKET, message_type
from ..engine.rules import parameter_rules
from ..engine.zero import autocast_modules, completed_config
from ..methods import Method
from ..optim.optimizers import parameter_groups
from .trace import LOW


@dataclass(frozen=True)
class Weight:
    """A parameter."""

    name: str
    numel: int
    group: str | None
    """The optimizer's group, or None if it is not trained."""
    teacher: bool
    sent: int
    """Bytes per element when ZeRO sends the weight or its gradient."""

    def part(self, world: int) -> int:
        """Return the elements per rank at stage 3, padding included."""
        return -(-self.numel // world)


def weights_of(method: Method, train: TrainConfig, precision: str) -> tuple[Weight, ...]:
    """Return all weights of a method, in its own order.

    Under autocast, DeepSpeed sends the weights of linear layers and convolutions in low precision at stages 1 to 3.
    """
    groups = parameter_groups(method, 0.0, parameter_rules(method, train))
    group_of = {id(p): group["name"] for group in groups for p in group["params"]}
    low = {
        id(p)
        for module in method.modules()
        if precision in LOW and type(module) in autocast_modules()
        for p in module.parameters(recurse=False)
    }
    return tuple(
        Weight(name, p.numel(), group_of.get(id(p)), name.startswith("teacher."), 2 if id(p) in low else 4)
        for name, p in method.named_parameters()
    )


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's ZeRO over ``world`` ranks; sizes are in elements."""

    stage: int
    world: int
    bucket: int
    """Size of a bucket of gradients, which are reduced together."""
    overlap: bool
    """Whether reductions and gathers overlap with computation."""
    offload: bool
    """Whether the optimizer's state is in the host's memory."""
    persistent: int
    """Stage 3 does not shard weights up to this size."""
    reuse: int
    """Gathered weights stay if they are used again within this number of elements."""
    prefetch: int
    """Size of one prefetch."""
    live: int
    """Prefetching stops at this number of gathered elements."""
    averaged: int = 4
    """Bytes per element of the gradients that stage 0 sends."""

    def keeps_whole(self, weight: Weight) -> bool:
        """Return whether a rank always has the whole weight."""
        return self.stage < 3 or weight.numel <= self.persistent


def zero_of(
    train: TrainConfig, stage: int, world: int, precision: str, weights: Iterable[Weight], *, on_gpu: bool = True
) -> Zero:
    """Return the engine's ZeRO settings, completed with DeepSpeed's defaults."""
    elements = sum(weight.numel for weight in trained(weights))
    settings = completed_config(train, stage, precision, elements)
    return Zero(
        stage,
        world,
        bucket=int(settings.reduce_bucket_size) if stage else BUCKET,
        overlap=bool(settings.overlap_comm) if stage else True,
        offload=train.offload_optimizer and stage > 0,
        persistent=int(settings.param_persistence_threshold),
        reuse=int(settings.max_reuse_distance),
        prefetch=int(settings.prefetch_bucket_size),
        live=int(settings.max_live_parameters),
        averaged=message_type(precision, on_gpu=on_gpu).itemsize,
    )


def trained(weights: Iterable[Weight]) -> list[Weight]:
    """Return the weights that the optimizer updates."""
    return [weight for weight in weights if weight.group is not None]


def flat_groups(weights: Sequence[Weight], world: int) -> list[tuple[list[Weight], int]]:
    """Return the concatenated weights of every group and the elements of a rank's equal part, at stages 1 and 2."""
    groups = []
    ordered = sorted(trained(weights), key=lambda weight: weight.group or "")
    for _, members in groupby(ordered, key=lambda weight: weight.group):
        group = list(members)
        # DeepSpeed's parts begin at multiples of 2 elements.
        groups.append((group, -(-sum(weight.numel for weight in group) // (2 * world)) * 2))
    return groups


@dataclass(frozen=True)
class Gathers:
    """The weights that stage 3 fetches in a micro-step."""

    bytes: int
    messages: int
    peak: int
    """Bytes of fetched weights at the worst moment. They are stored in fp32."""
    buffer: int
    """Bytes of the receive buffer."""


def gathers(weights: Sequence[Weight], uses: Sequence[Sequence[str]], zero: Zero) -> Gathers:
    """Simulate a micro-step of stage 3.

    A module's weights are fetched before its call unless they are gathered already. They are freed after the call
    unless they are used again within the next ``zero.reuse`` elements.
    """
    sharded = {weight.name: weight for weight in weights if not zero.keeps_whole(weight)}
    sizes = {weight.name: weight.numel for weight in weights}
    ends = _windows([sum(sizes[name] for name in names) for names in uses], zero.reuse)
    next_use: dict[tuple[int, str], int] = {}
    following: dict[str, int] = {}
    for index in range(len(uses) - 1, -1, -1):
        for name in uses[index]:
            next_use[index, name] = following.get(name, len(uses))
            following[name] = index
    gathered: dict[str, int] = {}
    total = elements = alive = peak = 0
    for index, names in enumerate(uses):
        for name in names:
            if name in sharded and name not in gathered:
                padded = sharded[name].part(zero.world) * zero.world
                gathered[name] = 4 * padded
                total, alive = total + sharded[name].sent * padded, alive + gathered[name]
                elements += padded
        peak = max(peak, alive)
        for name in names:
            if name in gathered and next_use[index, name] >= ends[index]:
                alive -= gathered.pop(name)
    # Every call prefetches further, up to ``zero.live`` elements.
    most = 4 * min(sum(weight.part(zero.world) * zero.world for weight in sharded.values()), zero.live)
    messages = -(-elements // zero.prefetch)
    return Gathers(total, messages, max(peak, most), -(-total // max(messages, 1)))


def _windows(sizes: Sequence[int], reach: int) -> list[int]:
    """Return for every position the first later position that is more than ``reach`` elements away."""
    ends, end, distance = [], 0, 0
    for start in range(len(sizes)):
        if end <= start:
            end, distance = start + 1, 0
        else:
            distance -= sizes[start]
        while end < len(sizes) and distance < reach:
            distance += sizes[end]
            end += 1
        ends.append(end)
    return ends
