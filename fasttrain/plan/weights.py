"""The weights of a method as ZeRO sees them, and what DeepSpeed is told to do with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from ..config.settings import TrainConfig
from ..engine.zero import autocast_modules, completed_config
from ..methods import Method
from ..optim.optimizers import parameter_groups
from .trace import LOW


@dataclass(frozen=True)
class Weight:
    """A parameter: how large it is, who owns it, and in how many bytes an element ZeRO sends it and its gradient."""

    name: str
    numel: int
    group: str | None
    """The optimizer's group, or None if it is not trained."""
    teacher: bool
    sent: int

    def part(self, world: int) -> int:
        """Elements that a rank holds of it at stage 3, padding included."""
        return -(-self.numel // world)


def weights_of(method: Method, train: TrainConfig, precision: str) -> tuple[Weight, ...]:
    """All weights of a method, in its own order.

    Under autocast DeepSpeed sends those of linear layers and convolutions in the lower precision, at stages 1 to 3.
    """
    groups = parameter_groups(method, 0.0, partial(method.parameter_rule, decay_all=train.decay_all))
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
    """Gradients that are reduced at once."""
    overlap: bool
    """Whether reductions and gathers run beside the products."""
    offload: bool
    """Whether the optimizer's state is in the host's memory."""
    persistent: int
    """Weights of up to this size stay whole at stage 3."""
    reuse: int
    """Weights that are used again within so many elements stay gathered."""
    prefetch: int
    """What is fetched ahead at once,"""
    live: int
    """as long as less than this is there."""

    def keeps_whole(self, weight: Weight) -> bool:
        """Whether a rank has the weight whole all the time."""
        return self.stage < 3 or weight.numel <= self.persistent


def zero_of(train: TrainConfig, stage: int, world: int, precision: str, weights: Iterable[Weight]) -> Zero:
    """What the engine tells DeepSpeed, with DeepSpeed's own defaults."""
    elements = sum(weight.numel for weight in trained(weights))
    given = completed_config(train, stage, precision, elements)
    return Zero(
        stage,
        world,
        bucket=int(given.reduce_bucket_size),
        overlap=bool(given.overlap_comm),
        offload=train.offload_optimizer and stage > 0,
        persistent=int(given.param_persistence_threshold),
        reuse=int(given.max_reuse_distance),
        prefetch=int(given.prefetch_bucket_size),
        live=int(given.max_live_parameters),
    )


def trained(weights: Iterable[Weight]) -> list[Weight]:
    """The weights that the optimizer moves."""
    return [weight for weight in weights if weight.group is not None]


def flat_groups(weights: Sequence[Weight], world: int) -> list[tuple[list[Weight], int]]:
    """Stages 1 and 2: the weights of every group, end to end, and the elements of a rank's equal part of them."""
    found = []
    ordered = sorted(trained(weights), key=lambda weight: weight.group or "")
    for _, members in groupby(ordered, key=lambda weight: weight.group):
        group = list(members)
        # DeepSpeed's parts begin at multiples of 2 elements.
        found.append((group, -(-sum(weight.numel for weight in group) // (2 * world)) * 2))
    return found


@dataclass(frozen=True)
class Gathers:
    """What stage 3 fetches in a micro-step."""

    bytes: int
    messages: int
    peak: int
    """Bytes of fetched weights at the worst moment, fp32 whatever they were sent in."""
    buffer: int
    """Bytes in which as many arrive as are asked for at once."""


def gathers(weights: Sequence[Weight], uses: Sequence[Sequence[str]], zero: Zero) -> Gathers:
    """Play a micro-step of stage 3: a module's weights are fetched before its call, if they are not there.

    After it they go, unless they are used again within ``zero.reuse`` elements of the modules to come.
    """
    sharded = {weight.name: weight for weight in weights if not zero.keeps_whole(weight)}
    sizes = {weight.name: weight.numel for weight in weights}
    ends = _windows([sum(sizes[name] for name in names) for names in uses], zero.reuse)
    # Where a weight is used next, seen from each of its uses.
    next_use: dict[tuple[int, str], int] = {}
    seen: dict[str, int] = {}
    for index in range(len(uses) - 1, -1, -1):
        for name in uses[index]:
            next_use[index, name] = seen.get(name, len(uses))
            seen[name] = index
    there: dict[str, int] = {}
    total = elements = alive = peak = 0
    for index, names in enumerate(uses):
        for name in names:
            if name in sharded and name not in there:
                padded = sharded[name].part(zero.world) * zero.world
                there[name] = 4 * padded
                total, alive = total + sharded[name].sent * padded, alive + there[name]
                elements += padded
        peak = max(peak, alive)
        for name in names:
            if name in there and next_use[index, name] >= ends[index]:
                alive -= there.pop(name)
    # Every call fetches further ahead, until so much is there.
    most = 4 * min(sum(weight.part(zero.world) * zero.world for weight in sharded.values()), zero.live)
    messages = -(-elements // zero.prefetch)
    return Gathers(total, messages, max(peak, most), -(-total // max(messages, 1)))


def _windows(sizes: Sequence[int], reach: int) -> list[int]:
    """For every position, the first one after it that lies beyond ``reach`` elements."""
    ends, end, within = [], 0, 0
    for start in range(len(sizes)):
        if end <= start:
            end, within = start + 1, 0
        else:
            within -= sizes[start]
        while end < len(sizes) and within < reach:
            within += sizes[end]
            end += 1
        ends.append(end)
    return ends
