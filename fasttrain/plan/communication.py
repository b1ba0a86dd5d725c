"""Bytes that an optimizer step sends between ranks, by what they are for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .group import Message
from .trace import Trace
from .update import Update
from .weights import Weight, Zero, flat_groups, gathers, trained


@dataclass(frozen=True)
class Traffic:
    """Collective operations of one kind and purpose in an optimizer step.

    ``bytes`` are those of the tensors: what is reduced, what is gathered of all ranks, what is scattered. A rank sends
    and receives (N - 1) / N of them, twice for an all-reduce. ``hidden`` says whether they run beside the products.
    """

    about: str
    kind: str
    bytes: int
    messages: int
    hidden: bool = False


def traffic(
    weights: Sequence[Weight], traced: Trace, update: Update, zero: Zero, *, accumulation: int = 1
) -> tuple[Traffic, ...]:
    """Everything but single numbers (norms, what is logged); nothing in a world of one."""
    if zero.world == 1:
        return ()
    found = [*gradient_traffic(weights, zero, accumulation), *_parameters(weights, traced, zero, accumulation)]
    found += [_summed(message, accumulation) for message in _sums(traced.messages)]
    return (*found, *(_summed(message, 1) for message in _sums(update.messages)))


def gradient_traffic(weights: Sequence[Weight], zero: Zero, accumulation: int = 1) -> list[Traffic]:
    """Gradients: all-reduced in fp32 at stage 0; in the precision of the products at stages 1 and 2; scattered at 3.

    DeepSpeed's stage 2 reduces all of them to all ranks too, and stages 2 and 3 do it every micro-step.
    """
    own = trained(weights)
    elements = sum(weight.numel for weight in own)
    messages = -(-elements // zero.bucket)
    if zero.stage == 0:
        return [Traffic("gradients", "all_reduce", 4 * elements, messages)]
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
    whole = [weight for weight in weights if zero.keeps_whole(weight)]
    size = sum(4 * weight.part(zero.world) * zero.world for weight in whole)
    return [
        Traffic(
            "fetched parameters",
            "all_gather",
            fetched.bytes * accumulation,
            fetched.messages * accumulation,
            zero.overlap,
        ),
        Traffic("small parameters", "all_gather", size, len(whole)),
    ]


def _sums(messages: Sequence[Message]) -> list[Traffic]:
    sizes: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for message in messages:
        sizes[message.about, message.kind] += message.bytes
        counts[message.about, message.kind] += 1
    return [Traffic(about, kind, sizes[about, kind], counts[about, kind]) for about, kind in sizes]


def _summed(one: Traffic, times: int) -> Traffic:
    return Traffic(one.about, one.kind, one.bytes * times, one.messages * times)
