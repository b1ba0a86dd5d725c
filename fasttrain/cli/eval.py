"""``fasttrain eval RUN|FILE|--timm NAME``: measure the quality of a network's features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import __version__
from ..config.arguments import Parser
from ..distributed.world import World, initialise
from ..errors import ConfigError, DataError, printable
from ..evaluate import protocol, table
from ..evaluate.cache import FeatureCache, default_folder
from ..evaluate.protocol import METRICS, Metric, Protocol
from ..files import finite
from ..flags import Count, FilePath, Paths, PathText, Several, flag, size_of
from ..models.architectures import check_crops
from ..pipelines import Size, Splits, measured, open_source, size_text
from ..pretrained import Backbone
from ..training.display import DataNotes, Display, new_console
from .output import write_json
from .source import SourceOptions, add_source, open_backbone

_DEFAULTS = Protocol()


@dataclass(frozen=True)
class EvalOptions:
    """The data and the figures of an evaluation."""

    data_path: Paths | None = flag(None, "training images; default: the run's own, else the embedded digits")
    val_path: Paths | None = flag(None, "held-out images, if data_path has no train/ and val/")
    pixel_range: tuple[float, ...] | None = flag(
        None, "MIN MAX of values that are not 8-bit; default: the run's own, else measured and printed"
    )
    metrics: tuple[Metric, ...] = flag(METRICS, "figures to measure: " + ", ".join(METRICS))
    knn_k: tuple[Count, ...] = flag(_DEFAULTS.ks, "numbers of neighbours")
    linear_epochs: Count = flag(_DEFAULTS.linear_epochs, "epochs of the linear probe")
    lidar_images: Several = flag(_DEFAULTS.lidar_images, "images for LiDAR and alignment")
    lidar_views: Several = flag(_DEFAULTS.lidar_views, "augmented views of each of those images")
    batch_size_per_gpu: Count = flag(128, "images per batch and rank")
    num_workers: Count | None = flag(None, "threads that decode; default: this rank's share of the cores")
    cache: PathText | None = flag(None, "folder of cached features, or none; default: ~/.cache/fasttrain/features")
    output: FilePath | None = flag(None, "also write the figures to this JSON file")


def main(arguments: Sequence[str]) -> int:
    """Evaluate a network; return the exit status.

    On several ranks: ``torchrun --nproc_per_node N --no-python fasttrain eval ...``.
    """
    parser = Parser("eval", "Evaluate a network's features on images.")
    add_source(parser)
    parser.add_settings("evaluation", EvalOptions)
    positional = None if any(argument.startswith("--timm") for argument in arguments) else "source"
    namespace, (source, options) = parser.options(arguments, SourceOptions, EvalOptions, positional=positional)
    if options.output and options.output.is_dir():
        raise ConfigError(f"--output {options.output}: is a folder. Give a file in it.")
    world = World.from_environment()
    backbone = open_backbone(namespace, source)
    size = size_of(source.size) or backbone.blueprint.size
    try:
        check_crops(backbone.network, [size], backbone.blueprint.pixels.channels, flag="--size")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    splits = _splits(backbone, options)
    backbone, lines = _with_range(backbone, splits, options)
    if world.size > 1:
        initialise(world)
    console = new_console(stderr=True, quiet=not world.is_main)
    for line in (*backbone.notes, *lines):
        console.print(line)
    console.print(f"{backbone.name} on {splits.name}, {size_text(size)} pixels")
    display = Display(0, console=console)
    cache = _cache(backbone, options, world, display)
    with DataNotes(), display:
        figures = protocol.evaluate(
            backbone, splits, cache, _protocol(options, source.seed), size=size, note=display.note
        )
    if figures is None:
        return 0
    console.print(f"features: {cache.extracted:,} images extracted, {cache.reused:,} cached")
    Console(highlight=False, markup=False).print(table.table(printable(f"{backbone.name} on {splits.name}"), figures))
    if options.output:
        about = _about(backbone, splits, cache, size, source.seed)
        write_json(options.output, finite(about | figures))
    return 0


def _splits(backbone: Backbone, options: EvalOptions) -> Splits:
    train = None if backbone.config is None else backbone.config.train
    data_path, val_path = options.data_path, options.val_path
    if data_path is None and train is not None:
        if train.in_memory:
            raise ConfigError("--data_path: is needed, because the run's images were in memory and have no path.")
        data_path, val_path = train.data_path, val_path or train.val_path
    return open_source(data_path, val_path)


def _with_range(backbone: Backbone, splits: Splits, options: EvalOptions) -> tuple[Backbone, list[str]]:
    """Return the network with the range of values that are not 8-bit, and lines that report it.

    The flag decides, else the range that the network was trained with, else a sample of the images.
    """
    pixels = backbone.blueprint.pixels
    try:
        if options.pixel_range is not None:
            pixels = replace(pixels, pixel_range=options.pixel_range)
        pixels, lines = measured(splits.train, pixels, ("channels", "mean", "std"))
    except DataError:
        raise
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
    return replace(backbone, blueprint=replace(backbone.blueprint, pixels=pixels)), lines


def _cache(backbone: Backbone, options: EvalOptions, world: World, display: Display) -> FeatureCache:
    folder = default_folder() if options.cache is None else Path(options.cache)
    return FeatureCache(
        backbone.network,
        torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu"),
        world,
        None if options.cache == "none" else folder,
        batch=options.batch_size_per_gpu,
        threads=options.num_workers or world.threads,
        note=display.note,
        progress=display.work,
    )


def _protocol(options: EvalOptions, seed: int) -> Protocol:
    return Protocol(
        metrics=options.metrics,
        ks=tuple(sorted(set(options.knn_k))),
        linear_epochs=options.linear_epochs,
        lidar_images=options.lidar_images,
        lidar_views=options.lidar_views,
        seed=seed,
    )


def _about(backbone: Backbone, splits: Splits, cache: FeatureCache, size: Size, seed: int) -> dict[str, Any]:
    return {
        "network": backbone.name,
        "arch": backbone.blueprint.arch,
        "checkpoint": None if backbone.checkpoint is None else str(backbone.checkpoint),
        "weights": cache.digest,
        "size": size if isinstance(size, int) else list(size),
        "dataset": splits.name,
        "images": len(splits.train),
        "images_val": None if splits.val is None else len(splits.val),
        "seed": seed,
        "extracted": cache.extracted,
        "cached": cache.reused,
        "version": __version__,
    }
