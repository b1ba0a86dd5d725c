"""``fasttrain eval RUN|FILE|--timm NAME``: how good a network's features are, beside others' on the same data."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> int:
    """Evaluate a network; returns the exit status: 0, or 2 with one line for what cannot be used.

    On several ranks: ``torchrun --nproc_per_node N --no-python fasttrain eval ...``.
    """
    from ..distributed.world import World, prepare_environment

    prepare_environment()
    try:
        from ..errors import ConfigError
        from ..pipelines import DataError
    except ModuleNotFoundError as error:
        return _fail(f"evaluation needs {error.name}; type: pip install 'fasttrain[train]'")
    try:
        return _evaluate(_parse(arguments))
    except (ConfigError, DataError) as error:
        return _fail(str(error)) if World.from_environment().is_main else 2


def _parse(arguments: Sequence[str]) -> Namespace:
    from ..config.arguments import Parser, underscored
    from ..errors import ConfigError
    from ..evaluate.cache import default_folder
    from ..evaluate.protocol import METRICS, Protocol
    from ..pretrained import add_source_flags

    defaults = Protocol()
    parser = Parser(
        prog="fasttrain eval",
        description="Evaluate a network's features. The data is the run's own unless given, for other networks the "
        "embedded digits.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page")
    add_source_flags(parser)
    parser.add_argument("--data_path", metavar="PATH", help="training images")
    parser.add_argument("--val_path", metavar="PATH", help="held-out images, if data_path has no train/ and val/")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="default: all of them")
    parser.add_argument("--knn_k", nargs="+", type=int, default=list(defaults.ks), metavar="K", help="neighbours")
    epochs = f"epochs of the linear probe (default: {defaults.linear_epochs})"
    parser.add_argument("--linear_epochs", type=int, default=defaults.linear_epochs, metavar="N", help=epochs)
    images = f"images that LiDAR and alignment see (default: {defaults.lidar_images})"
    parser.add_argument("--lidar_images", type=int, default=defaults.lidar_images, metavar="N", help=images)
    views = f"augmented views of each (default: {defaults.lidar_views})"
    parser.add_argument("--lidar_views", type=int, default=defaults.lidar_views, metavar="N", help=views)
    parser.add_argument("--batch_size_per_gpu", type=int, default=128, metavar="N", help="images a batch and rank")
    parser.add_argument("--num_workers", type=int, metavar="N", help="threads that decode")
    where = f"where features are kept, or none (default: {default_folder()})"
    parser.add_argument("--cache", metavar="DIR|none", default=str(default_folder()), help=where)
    parser.add_argument("--output", metavar="FILE.json", help="write the figures there too")
    given: Namespace = parser.parse_args([underscored(a) for a in arguments])
    least = {"linear_epochs": 1, "lidar_images": 2, "lidar_views": 2, "batch_size_per_gpu": 1, "num_workers": 1}
    for name, minimum in least.items():
        value = getattr(given, name)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name} must be at least {minimum}, got {value}")
    if min(given.knn_k) < 1:
        raise ConfigError(f"--knn_k must be at least 1, got {min(given.knn_k)}")
    if given.output and Path(given.output).is_dir():  # not after all has been computed
        raise ConfigError(f"--output {given.output} is a folder; give a file in it")
    return given


def _evaluate(given: Namespace) -> int:
    import torch
    from rich.console import Console

    from .. import __version__
    from ..distributed.world import World, initialise
    from ..errors import ConfigError
    from ..evaluate.cache import FeatureCache
    from ..evaluate.protocol import Protocol, evaluate
    from ..evaluate.table import table
    from ..models.architectures import check_crops
    from ..pipelines import open_source
    from ..pretrained import open_backbone
    from ..training.display import DataNotes

    world = World.from_environment()
    backbone = open_backbone(given)
    size = given.size or backbone.blueprint.size
    try:
        check_crops(backbone.network, [size], backbone.blueprint.channels)
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from None
    own = backbone.config.train if backbone.config is not None else None
    data_path, val_path = given.data_path, given.val_path
    if data_path is None and own is not None:
        data_path, val_path = own.data_path, val_path or own.val_path
        if own.in_memory:
            raise ConfigError("the run's images were in memory and have no path; give some by --data_path")
    splits = open_source(data_path, val_path)
    if world.size > 1:
        initialise(world)
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    console = Console(stderr=True, highlight=False, quiet=not world.is_main, soft_wrap=True)
    cache = FeatureCache(
        backbone.network,
        device,
        world,
        None if given.cache == "none" else Path(given.cache).expanduser(),
        batch=given.batch_size_per_gpu,
        threads=given.num_workers or world.threads,
    )
    protocol = Protocol(
        metrics=tuple(given.metrics),
        ks=tuple(sorted(set(given.knn_k))),
        linear_epochs=given.linear_epochs,
        lidar_images=given.lidar_images,
        lidar_views=given.lidar_views,
        seed=given.seed,
    )
    console.print(f"{backbone.name} on {splits.name}, {size} pixels")
    with DataNotes():
        figures = evaluate(backbone, splits, cache, protocol, size=size, note=console.print)
    if figures is None:
        return 0
    about: dict[str, Any] = {
        "network": backbone.name,
        "arch": backbone.blueprint.arch,
        "checkpoint": None if backbone.checkpoint is None else str(backbone.checkpoint),
        "weights": cache.digest,
        "size": size,
        "dataset": splits.name,
        "images": len(splits.train),
        "images_val": None if splits.val is None else len(splits.val),
        "seed": given.seed,
        "extracted": cache.extracted,
        "cached": cache.found,
        "version": __version__,
    }
    where = "" if given.cache == "none" else f", in {given.cache}"
    console.print(f"features of {cache.extracted:,} images extracted, of {cache.found:,} found{where}")
    Console(highlight=False).print(table(f"{backbone.name} on {splits.name}", figures))
    if given.output:
        _write(Path(given.output), about | figures)
    return 0


def _write(path: Path, content: dict[str, Any]) -> None:
    from ..errors import ConfigError
    from ..files import finite

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(finite(content), indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}") from None


def _fail(message: str) -> int:
    print(f"fasttrain: {message}", file=sys.stderr)
    return 2
