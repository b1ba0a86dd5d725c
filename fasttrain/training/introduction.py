"""The first lines of a run: the images, the classes, and everything that was left out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..config.resolve import Config
from ..distributed.world import World, all_gather_object
from ..errors import DataError
from ..models.architectures import ConvSmall, is_vit
from ..pipelines import Listing, Summary

_CLASSES = 8
"""Class names that are printed; the others are counted."""


def data_lines(summary: Summary, damaged: Mapping[str, str]) -> list[str]:
    """Return what was found at the data paths, one line per fact. ``damaged`` are shards that are used in part."""
    train = summary.train
    lines = [f"{summary.name}: {train.images:,} training images, {summary.held_out:,} held-out images"]
    lines.append(_labels(train))
    lines += _left_out(train, "training") + ([] if summary.val is None else _left_out(summary.val, "held-out"))
    if summary.unused:
        lines.append(f"not used, next to train/: {', '.join(summary.unused)}")
    lines += [f"{name}: {damage}" for name, damage in damaged.items()]
    return lines


def without_effect(config: Config, network: nn.Module) -> list[str]:
    """Return a line for each setting that the caller gave and that the network does not have."""
    requested = {} if config.request is None else config.request.values
    of_vits = ("patch_size", "num_heads") if not is_vit(network) else ()
    of_blocks = ("drop_path_rate",) if isinstance(network, ConvSmall) else ()
    return [
        f"--{name}: has no effect on {config.train.arch}"
        for name in (*of_vits, *of_blocks)
        if requested.get(name) is not None
    ]


def slow_random_layers(config: Config, *, has_weights: bool) -> list[str]:
    """Return a warning for slow or frozen layers of a network that was not built with weights (``has_weights``)."""
    t = config.train
    if has_weights or t.init_from is not None or (t.layer_decay >= 1 and not t.freeze_backbone_epochs):
        return []
    name = "layer_decay" if t.layer_decay < 1 else "freeze_backbone_epochs"
    return [f"warning: --{name}: keeps layers near their random start. Give the network weights with --init_from."]


def check_ranks(summary: Summary, world: World) -> None:
    """Raise DataError, on all ranks, if a rank lists other images than rank 0. Collective.

    Data of a path is opened once (``opening.py``); a program may give every rank its own.
    """
    first, *others = all_gather_object(world, (summary.digest, summary.train.images, summary.held_out))
    for rank, other in enumerate(others, start=1):
        if other != first:
            counts = [f"{train:,} + {held_out:,}" for _, train, held_out in (first, other)]
            raise DataError(
                f"--data_path: rank 0 and rank {rank} list other images ({counts[0]} and {counts[1]}). Give all "
                "ranks the same data."
            )


def _labels(listing: Listing) -> str:
    if not listing.classes:
        labelled = f"labels from {listing.labels_from}, without class names" if listing.labels_from else ""
        return labelled or (f"no labels: {listing.unlabelled}" if listing.unlabelled else "no labels")
    names = ", ".join(listing.classes[:_CLASSES])
    more = ", ..." if len(listing.classes) > _CLASSES else ""
    return f"{len(listing.classes):,} classes from {listing.labels_from}: {names}{more}"


def _left_out(listing: Listing, kind: str) -> list[str]:
    lines = []
    if listing.pictures_left_out:
        files = ", ".join(f"{count:,} {extension}" for extension, count in listing.pictures_left_out.items())
        lines.append(f"left out of the {kind} images, because the format is not read: {files}")
    for name, (count, path) in listing.special.items():
        lines.append(f"left out of the {kind} images: {count:,} x {name}, such as {path}")
    if listing.split_like:
        names = ", ".join(listing.split_like)
        lines.append(
            f"taken as classes, but named like splits: {names}. If they are splits, call them train and val, or give "
            "them as --data_path and --val_path."
        )
    if listing.links_back:
        lines.append(f"links to a folder that is listed already, not followed: {', '.join(listing.links_back)}")
    return lines + list(listing.notes)
