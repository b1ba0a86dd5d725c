"""``fasttrain.train(...)``: a run from Python or a notebook, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch must not be imported before its threads are set, see train
    from torch import nn

    from .config.settings import Config
    from .pipelines import Source, Splits
    from .pipelines.sources.dataset import MapDataset


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run."""

    network: nn.Module
    """The trained backbone on the CPU, in evaluation mode: the teacher's where the method has one. Images [B, C, H, W],
    normalised as ``config.views`` says, become features [B, D]."""
    metrics: tuple[Mapping[str, Any], ...]
    """The lines of ``metrics.jsonl``, one a logged step: ``step``, ``epoch``, ``loss``, the bound in nats, rates,
    ``images_per_s``, and ``knn_top1`` (a fraction) where it was measured."""
    summary: Mapping[str, Any]
    """What ``summary.json`` holds: the figures at the end."""
    config: Config
    """Everything that decided the run."""
    data: Splits
    """The images that it was trained on, and those held out."""
    output_dir: Path
    """The run's folder, which ``fasttrain eval``, ``export`` and ``report`` take."""
    checkpoint: Path
    """The folder of its newest checkpoint."""

    def report(self, output: str | os.PathLike[str] | None = None, *, images: int = 1000) -> Path:
        """Write the page of ``fasttrain report``; returns its path, by default ``output_dir/report.html``.

        ``images`` are in the map of features; 0 leaves out all that needs the data. Raises ConfigError where the page
        cannot be written.
        """
        from .cli.report import report

        path = None if output is None else Path(output)
        return report([self.output_dir], path, images=images, splits=self.data)[0]

    def __repr__(self) -> str:
        c, s = self.config, self.summary
        figures = [f"{c.method}{'+ER' if c.entropy else ''}", f"{s['steps']} steps in {s['seconds']:.0f} s"]
        figures += [f"{name} {s[key]:.3f}" for key, name in _SHOWN.items() if s.get(key) is not None]
        return f"Result({', '.join([*figures, str(self.output_dir)])})"


_SHOWN = {"knn_top1": "k-NN", "rankme": "RankMe", "information": "information"}


def train(
    method: str,
    *,
    entropy: bool | None = None,
    data: str | os.PathLike[str] | MapDataset | Source | Splits | None = None,
    val: str | os.PathLike[str] | MapDataset | Source | None = None,
    config: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Result:
    """Train as ``fasttrain train --method METHOD`` does, with a live display in terminals and notebooks.

    ``data`` is what ``--data_path`` takes (nothing: the embedded digits), a map-style data set as
    :func:`fasttrain.pipelines.source_from_dataset` reads it, a source, or ``Splits`` of both; ``val`` is the same for
    held-out images, which serve k-NN only. ``config`` is a YAML file, as a run's config.yaml; ``settings`` are the
    flags of the command line by name (``epochs=30, lr=1e-3, recipe="cifar", output_dir="runs/mine"``), and overrule
    it, as ``entropy`` does.

    Under ``torchrun`` or ``deepspeed`` every rank calls it and gets the same result. Raises ImportError without the
    ``train`` extra; ConfigError or DataError, both ValueError, for invalid input; Diverged if the loss or
    gradients stay not finite; Collapsed with ``stop_on_collapse``; Interrupted after SIGTERM,
    Ctrl-C or a notebook's stop button, with a checkpoint that the same call with the same ``output_dir`` goes on from;
    Crashed for any other error.

    Source: the methods are those of docs/methods.md, the bound that of arXiv 2307.10907.
    """
    from .distributed.world import World, initialise, prepare_environment

    prepare_environment()
    try:
        from .config.arguments import read_yaml
        from .config.settings import IN_MEMORY, resolve
        from .distributed.watchdog import starting
        from .engine.zero import quiet_deepspeed
        from .pipelines import open_source
        from .pretrained import from_run
        from .training.records import output_folder
        from .training.trainer import train as run
    except ModuleNotFoundError as error:
        raise ImportError(f"the trainer needs {error.name}; type: pip install 'fasttrain[train]'") from error

    quiet_deepspeed()
    world = World.from_environment()
    given = _splits(data, val)
    paths: dict[str, Any] = {"data_path": IN_MEMORY + given.name} if given else {"data_path": data, "val_path": val}
    values = {name: os.fspath(path) for name, path in paths.items() if path is not None} | settings
    values |= {} if entropy is None else {"entropy": entropy}
    chosen = resolve(method, values, None if config is None else read_yaml(Path(config)))
    with starting(world, chosen.train.watchdog_minutes):
        initialise(world)
    output = output_folder(chosen, world)
    chosen = dataclasses.replace(chosen, train=dataclasses.replace(chosen.train, output_dir=str(output)))
    t = chosen.train
    splits = given or open_source(t.data_path, t.val_path, cache=output / "index")
    summary = run(chosen, world, splits)
    backbone = from_run(output)
    assert backbone.checkpoint is not None
    metrics = tuple(json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    return Result(backbone.network, metrics, summary, chosen, splits, output, backbone.checkpoint)


def _splits(data: Any, val: Any) -> Splits | None:
    """Images that have no path; None where the configuration tells their paths. Raises ConfigError for a mixture."""
    from .errors import ConfigError
    from .pipelines import Splits, source_from_dataset

    if data is None or isinstance(data, str | os.PathLike):
        if not (val is None or isinstance(val, str | os.PathLike)):
            raise ConfigError("val is a data set in memory, data is not; give both as paths or both as data sets")
        return None
    if val is not None and isinstance(val, str | os.PathLike | Splits):
        raise ConfigError(f"data is in memory, so val must be a data set too, got {val!r}")
    if isinstance(data, Splits):
        if val is not None:
            raise ConfigError("data has its held-out images already; leave val out")
        return data
    for name, one in (("data", data), ("val", val)):
        if one is not None and not (hasattr(one, "__len__") and (hasattr(one, "__getitem__") or hasattr(one, "read"))):
            raise ConfigError(f"{name} is {type(one).__name__}; give a path, a map-style data set or a source")
    train, held_out = (one if one is None or hasattr(one, "read") else source_from_dataset(one) for one in (data, val))
    assert train is not None
    return Splits(train.name, train, held_out)
