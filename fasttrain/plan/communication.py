"""Bytes that an optimizer step sends between ranks, by purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.reduction import places
from .group import Message
from .trace import Trace
from .update import Update
from .weights import Weight, Zero, flat_groups, gathers, trained


@dataclass(frozen=True)
class Traffic:
    """Collective operations of one kind and purpose in an optimizer step.

    ``bytes`` is the size of the tensors: the reduced tensors, the outputs of gathers, or the inputs of scatters. Each
    of N ranks sends and receives (N - 1) / N of it, twice for an all-reduce. ``hidden`` operations overlap with
    computation.
    """

    about: str
    kind: str
    bytes: int
    messages: int
    hidden: bool = False


def traffic(
    weights: Sequence[Weight], traced: Trace, update: Update, zero: Zero, *, accumulation: int = 1
) -> tuple[Traffic, ...]:
    """Return all traffic except single values, such as norms and logged scalars. One rank sends nothing."""
    if zero.world == 1:
        return ()
    operations = [*gradient_traffic(weights, zero, accumulation), *_parameters(weights, traced, zero, accumulation)]
    operations += _sums(traced.messages, accumulation)
    return (*operations, *_sums(update.messages, 1))


def gradient_traffic(weights: Sequence[Weight], zero: Zero, accumulation: int = 1) -> list[Traffic]:
    """Return the traffic of gradients.

    Stage 0 all-reduces them during the backward pass. Stages 1 and 2 all-reduce them in the precision of the products.
    Stage 3 scatters them. Stages 2 and 3 do so every micro-step.
    """
    own = trained(weights)
    elements = sum(weight.numel for weight in own)
    messages = -(-elements // zero.bucket)
    if zero.stage == 0:
        size = zero.averaged * sum(places(weight.numel) for weight in own)
        return [Traffic("gradients", "all_reduce", size, messages, zero.overlap)]
    times = accumulation if zero.stage > 1 else 1
    if zero.stage == 3:
        size = sum(weight.part(zero.world) * zero.world * weight.sent for weight in own)
        return [Traffic("gradients", "reduce_scatter", size * times, messages * times, zero.overlap)]
    size = sum(weight.numel * weight.sent for weight in own)
    return [Traffic("gradients", "all_reduce", size * times, messages * times, zero.overlap)]


def _parameters(weights: Sequence[Weight], traced: Trace, zero: Zero, accumulation: int) -> list[Traffic]:
    if zero.stage == 0:
        return []
    if zero.stage < 3:
        parts = [part for _, part in flat_groups(weights, zero.world)]
        return [Traffic("updated parameters", "all_gather", 4 * sum(parts) * zero.world, len(parts))]
    fetched = gathers(weights, traced.uses, zero)
    size, count = fetched.bytes * accumulation, fetched.messages * accumulation
    whole = [weight for weight in weights if zero.keeps_whole(weight)]
    small = sum(4 * weight.part(zero.world) * zero.world for weight in whole)
    return [
        Traffic("fetched parameters", "all_gather", size, count, zero.overlap),
        Traffic("small parameters", "all_gather", small, len(whole)),
    ]


def _sums(messages: Sequence[Message], times: int) -> list[Traffic]:
    """Sum messages by purpose and kind, sent ``times`` times."""
    sizes: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for message in messages:
        sizes[message.about, message.kind] += message.bytes * times
        counts[message.about, message.kind] += times
    return [Traffic(about, kind, sizes[about, kind], counts[about, kind]) for about, kind in sizes]
