"""Bytes that a rank holds, by what they are for, at the two moments when it holds most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .trace import Trace
from .update import Update
from .weights import Weight, Zero, flat_groups, gathers, trained

_PREFETCHED = 2  # batches that the loader keeps ready beside the one in hand (pipelines.Loader)


@dataclass(frozen=True)
class Part:
    """Bytes for one purpose, while the backward pass begins and while the optimizer moves."""

    name: str
    backward: int
    update: int


def parts(
    weights: Sequence[Weight], buffers: int, traced: Trace, update: Update, zero: Zero, *, accumulation: int = 1
) -> tuple[Part, ...]:
    """What one rank holds; the sum at a moment is what the run needs then.

    Gradients are counted whole beside all activations, though they come as those go.
    """
    stage = zero.stage
    arriving = gathers(weights, traced.uses, zero)  # nothing but at stage 3
    sent = sorted({weight.sent for weight in trained(weights)})
    elements = sum(weight.numel for weight in trained(weights))
    held, teacher = (
        4 * sum(_elements_held(weight, zero) for weight in weights if weight.teacher == of_teacher)
        for of_teacher in (False, True)
    )
    shard = shard_elements(weights, zero)
    state = 0 if zero.offload else update.state * shard // elements
    master = 4 * shard if stage in (1, 2) and not zero.offload else 0
    buckets, copy = _buckets(elements, sent, zero)
    during = copy if stage >= 2 else 0
    step = copy if zero.offload else max(copy, update.temporary * shard // elements + (4 * shard if stage else 0))
    gradients = gradient_bytes(weights, zero)
    # Where gradients accumulate, stage 2 adds a new set to the old: when a bucket is full, or at the end.
    again = gradients if stage == 2 and accumulation > 1 else 0
    amid = again if elements > zero.bucket else 0
    views = traced.inputs * (1 + _PREFETCHED)
    return (
        Part("parameters", held, held),
        Part("teacher", teacher, teacher),
        Part("buffers", buffers, buffers),
        Part("optimizer", state + master, state + master),
        Part("gradients", gradients + amid, gradients + again),
        Part("activations", traced.kept, 0),
        Part("weights in low precision", traced.weight_copies, 0),
        Part("loss", traced.kept_by_loss, 0),
        Part("temporary", traced.temporary, step),
        Part("views", views, views),
        Part("ZeRO's buckets", buckets + during, buckets),
        Part("fetched parameters", arriving.peak + arriving.buffer, 0),
    )


def _elements_held(weight: Weight, zero: Zero) -> int:
    """Elements of a weight on a rank: whole, or its part; at stage 3 small weights are there both ways."""
    whole = weight.numel if zero.keeps_whole(weight) else 0
    return whole + (weight.part(zero.world) if zero.stage == 3 else 0)


def shard_elements(weights: Sequence[Weight], zero: Zero) -> int:
    """Elements of trained weights that a rank's optimizer moves."""
    if zero.stage == 0:
        return sum(weight.numel for weight in trained(weights))
    if zero.stage == 3:
        return sum(weight.part(zero.world) for weight in trained(weights))
    return sum(part for _, part in flat_groups(weights, zero.world))


def gradient_bytes(weights: Sequence[Weight], zero: Zero, rank: int | None = None) -> int:
    """Bytes of gradients, fp32: all of them before they are reduced (stages 0 and 1), or a rank's own.

    At stage 2 a rank keeps a weight's gradient whole if any of it is in its part; ``rank`` is the one that has most
    unless it is given.
    """
    if zero.stage < 2:
        return 4 * sum(weight.numel for weight in trained(weights))
    if zero.stage == 3:
        return 4 * shard_elements(weights, zero)
    own = [0] * zero.world
    for group, part in flat_groups(weights, zero.world):
        start = 0
        for weight in group:
            for owner in range(start // part, (start + weight.numel - 1) // part + 1):
                own[owner] += weight.numel
            start += weight.numel
    most: int = max(own) if rank is None else own[rank]
    return 4 * most


def _buckets(elements: int, sent: Sequence[int], zero: Zero) -> tuple[int, int]:
    """What DeepSpeed sets aside for gradients on their way, and the copy that it makes of a full bucket to send it.

    The buckets have their full size however few the gradients; under autocast there is one for each precision. Where
    stages 1 and 2 reduce one beside the products there is a second one to fill meanwhile.
    """
    full = min(elements, zero.bucket)
    if zero.stage == 0:
        return 0, 4 * full
    if zero.stage == 3:
        return zero.bucket * sum(sent), full * max(sent)
    return zero.bucket * 4 * len(sent) * (2 if zero.overlap else 1), full * (4 if sent == [4] else 6)


def total(found: Sequence[Part]) -> int:
    """Bytes at the worse of the two moments."""
    return max(sum(part.backward for part in found), sum(part.update for part in found))


def largest_batch(few: Sequence[Part], batch: int, many: Sequence[Part], other: int, usable: float) -> int:
    """The most images that fit into ``usable`` bytes, from what ``batch`` and ``other`` images take.

    What a batch takes is a constant and a part that grows with it, but for the temporary bytes: they are the largest of
    several such sums, and so between the two batches less than said here.
    """
    most: float = 2**31
    for moment in ("backward", "update"):
        low, high = (sum(getattr(part, moment) for part in found) for found in (few, many))
        an_image, room = (high - low) / (other - batch), usable - low
        if an_image > 0:
            most = min(most, batch + room / an_image)
        elif room < 0:
            return 0
    return max(int(most), 0)
