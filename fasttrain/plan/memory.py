"""Memory per rank by purpose, at the two moments with the largest totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .trace import Trace
from .update import Update
from .weights import Weight, Zero, flat_groups, gathers, trained

_PREFETCHED = 2  # batches that pipelines.Loader prepares in addition to the current one


@dataclass(frozen=True)
class Part:
    """Bytes for one purpose at the start of the backward pass, and during the optimizer's update."""

    name: str
    backward: int
    update: int


def parts(
    weights: Sequence[Weight], buffers: int, traced: Trace, update: Update, zero: Zero, *, accumulation: int = 1
) -> tuple[Part, ...]:
    """Return the memory of one rank. The sum over the parts at a moment is the memory at that moment.

    All gradients count together with all activations. In fact gradients appear while activations are freed.
    """
    stage = zero.stage
    fetched = gathers(weights, traced.uses, zero)  # empty below stage 3
    sent = sorted({weight.sent for weight in trained(weights)})
    elements = sum(weight.numel for weight in trained(weights))
    student, teacher = (
        4 * sum(_local_elements(weight, zero) for weight in weights if weight.teacher == of_teacher)
        for of_teacher in (False, True)
    )
    shard = shard_elements(weights, zero)
    state = 0 if zero.offload else update.state * shard // elements
    master = 4 * shard if stage in (1, 2) and not zero.offload else 0
    buckets, copy = _buckets(elements, sent, zero)
    during = copy if stage >= 2 else 0
    step = copy if zero.offload else max(copy, update.temporary * shard // elements + (4 * shard if stage else 0))
    gradients = gradient_bytes(weights, zero)
    # When gradients accumulate, stage 2 adds a second set to the first when a bucket is full, or at the end.
    second = gradients if stage == 2 and accumulation > 1 else 0
    second_early = second if elements > zero.bucket else 0
    views = traced.inputs * (1 + _PREFETCHED)
    return (
        Part("parameters", student, student),
        Part("teacher", teacher, teacher),
        Part("buffers", buffers, buffers),
        Part("optimizer", state + master, state + master),
        Part("gradients", gradients + second_early, gradients + second),
        Part("activations", traced.kept, 0),
        Part("weights in low precision", traced.weight_copies, 0),
        Part("loss", traced.kept_by_loss, 0),
        Part("temporary", traced.temporary, step),
        Part("views", views, views),
        Part("ZeRO's buckets", buckets + during, buckets),
        Part("fetched parameters", fetched.peak + fetched.buffer, 0),
    )


def _local_elements(weight: Weight, zero: Zero) -> int:
    """Return the elements of a weight on a rank. Stage 3 stores small weights both whole and sharded."""
    whole = weight.numel if zero.keeps_whole(weight) else 0
    return whole + (weight.part(zero.world) if zero.stage == 3 else 0)


def shard_elements(weights: Sequence[Weight], zero: Zero) -> int:
    """Return the number of elements that a rank's optimizer updates."""
    if zero.stage == 0:
        return sum(weight.numel for weight in trained(weights))
    if zero.stage == 3:
        return sum(weight.part(zero.world) for weight in trained(weights))
    return sum(part for _, part in flat_groups(weights, zero.world))


def gradient_bytes(weights: Sequence[Weight], zero: Zero, rank: int | None = None) -> int:
    """Return the bytes of fp32 gradients: all of them (stages 0 and 1), or the gradients of a rank (2 and 3).

    At stage 2, a rank keeps the whole gradient of a weight if any element is in its part. Without ``rank``, the result
    is the maximum over the ranks.
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
    """Return the bytes of the gradients' buckets, and of the copy of a full bucket that DeepSpeed sends.

    Buckets have their full size even with few gradients. Autocast needs one bucket per precision. Stages 1 and 2 need a
    second bucket if reductions overlap with computation.
    """
    full = min(elements, zero.bucket)
    if zero.stage == 0:  # gradients stay in their buckets; the sent ones of lower precision exist besides
        return 0, 0 if zero.averaged == 4 or zero.world == 1 else zero.averaged * elements
    if zero.stage == 3:
        return zero.bucket * sum(sent), full * max(sent)
    return zero.bucket * 4 * len(sent) * (2 if zero.overlap else 1), full * (4 if sent == [4] else 6)


def total(memory: Sequence[Part]) -> int:
    """Return the bytes at the worse of the two moments."""
    return max(sum(part.backward for part in memory), sum(part.update for part in memory))


def largest_batch(few: Sequence[Part], batch: int, many: Sequence[Part], other: int, usable: float) -> int:
    """Return the largest batch that fits in ``usable`` bytes, from the memory of ``batch`` and ``other`` images.

    Memory is linear in the batch, except for the temporary bytes. They are a maximum of linear functions, so between
    the two batches they are below the straight line used here.
    """
    most: float = 2**31
    for moment in ("backward", "update"):
        low, high = (sum(getattr(part, moment) for part in memory) for memory in (few, many))
        per_image, room = (high - low) / (other - batch), usable - low
        if per_image > 0:
            most = min(most, batch + room / per_image)
        elif room < 0:
            return 0
    return max(int(most), 0)
