"""``fasttrain.train(...)``: a run from Python or a notebook, and its result."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError

if TYPE_CHECKING:  # torch must not be imported before its threads are set, see train
    from torch import nn

    from .config.resolve import Config
    from .methods import Method
    from .pipelines import Source, Splits
    from .pipelines.sources.dataset import MapDataset


@dataclass(frozen=True, repr=False)
class Result:
    """A finished run."""

    network: nn.Module
    """The trained backbone on the CPU, in evaluation mode: the teacher's if the method has one. It returns features
    [B, D] for images [B, C, H, W] that are normalised as ``config.views`` says."""
    metrics: tuple[Mapping[str, Any], ...]
    """The lines of ``metrics.jsonl``, one per logged step: ``step``, ``epoch``, ``loss``, the bound in nats, rates,
    ``images_per_s``, and ``knn_top1`` (a fraction) where it was measured."""
    summary: Mapping[str, Any]
    """The content of ``summary.json``: the figures at the end."""
    config: Config
    """Everything that determined the run."""
    data: Splits
    """The training images and the held-out images."""
    output_dir: Path
    """The run's folder, for ``fasttrain eval``, ``export`` and ``report``."""
    checkpoint: Path
    """The folder of its newest checkpoint."""

    def report(self, output: str | os.PathLike[str] | None = None, *, images: int = 1000) -> Path:
        """Write the page of ``fasttrain report``; return its path, by default ``output_dir/report.html``.

        ``images`` are in the map of features; 0 leaves out everything that needs the data. Raise ConfigError if the
        page cannot be written.
        """
        from .report.write import write_report

        path = None if output is None else Path(output)
        return write_report([self.output_dir], path, images=images, splits=self.data)[0]

    def __repr__(self) -> str:
        s = self.summary
        figures = [self.config.title, f"{s['steps']} steps in {s['seconds']:.0f} s"]
        figures += [f"{name} {s[key]:.3f}" for key, name in _SHOWN.items() if s.get(key) is not None]
        return f"Result({', '.join([*figures, str(self.output_dir)])})"


_SHOWN = {"knn_top1": "k-NN", "rankme": "RankMe", "information": "information"}


def train(
    method: str | type[Method],
    *,
    entropy: bool | None = None,
    data: str | os.PathLike[str] | MapDataset | Source | Splits | None = None,
    val: str | os.PathLike[str] | MapDataset | Source | None = None,
    model: nn.Module | Callable[[int], nn.Module] | None = None,
    config: str | os.PathLike[str] | None = None,
    plugin: str | os.PathLike[str] | None = None,
    recipe: str | None = None,
    data_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    val_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    data_weights: Sequence[float] | None = None,
    arch: str | None = None,
    patch_size: int | None = None,
    num_heads: int | None = None,
    activation_checkpointing: bool | None = None,
    drop_path_rate: float | None = None,
    drop_path_subset: bool | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    lr_scaling: Literal["linear", "sqrt"] | None = None,
    min_lr: float | None = None,
    lr_drops: Sequence[float] | None = None,
    constant_lr: bool | None = None,
    warmup_epochs: float | None = None,
    weight_decay: float | None = None,
    weight_decay_end: float | None = None,
    decay_all: bool | None = None,
    layer_decay: float | None = None,
    patch_embed_lr_mult: float | None = None,
    freeze_backbone_epochs: float | None = None,
    clip_grad: float | None = None,
    clip_each: bool | None = None,
    epochs: int | None = None,
    batch_size_per_gpu: int | None = None,
    gradient_accumulation_steps: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    num_workers: int | None = None,
    max_bad_fraction: float | None = None,
    zero_stage: Literal[0, 1, 2, 3] | None = None,
    overlap_comm: bool | None = None,
    offload_optimizer: bool | None = None,
    deepspeed_config: str | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None,
    seed: int | None = None,
    deterministic: bool | None = None,
    init_from: str | os.PathLike[str] | None = None,
    resume: str | None = None,
    reference_path: str | os.PathLike[str] | None = None,
    max_forgetting: float | None = None,
    saveckp_freq: int | None = None,
    keep: int | None = None,
    saveckp_freq_steps: int | None = None,
    limit_steps: int | None = None,
    trackers: Sequence[Literal["tensorboard", "wandb", "mlflow", "none"]] | None = None,
    log_every: int | None = None,
    max_skipped_steps: int | None = None,
    rollback: int | None = None,
    watchdog_minutes: float | None = None,
    stop_on_collapse: bool | None = None,
    knn_every: int | None = None,
    knn_train_images: int | None = None,
    knn_val_images: int | None = None,
    global_crops_size: int | tuple[int, int] | None = None,
    global_crops_scale: tuple[float, float] | None = None,
    local_crops_number: int | None = None,
    local_crops_size: int | tuple[int, int] | None = None,
    local_crops_scale: tuple[float, float] | None = None,
    channels: int | None = None,
    pixel_range: Sequence[float] | None = None,
    **method_settings: Any,
) -> Result:
    """Train as ``fasttrain train --method METHOD`` does, with a live display in terminals and notebooks.

    Args:
        method: the name of a method, or a class registered with :func:`fasttrain.methods.register`.
        entropy: train the entropy-reconstruction twin of the method.
        data: like ``--data_path`` (None: the embedded digits), a map-style data set
            (:func:`fasttrain.pipelines.source_from_dataset`), a ``datasets.Dataset`` or ``DatasetDict`` of Hugging
            Face, a source, or ``Splits`` of both. A list of these is a mixture, with the shares ``data_weights``.
        val: the same for held-out images, which are used for k-NN only.
        model: a backbone to train instead of ``arch``: a module that returns features [B, D], which is copied, or a
            function that builds one for a number of input channels. Training starts from the module's weights.
        config: a YAML file, such as the config.yaml of a run.
        plugin: a Python file that registers the method; it is run.
        recipe: a set of published or tested values (``fasttrain train --recipe list``).
        data_path, val_path: other names of ``data`` and ``val``, for paths.
        **method_settings: the method's own settings, such as ``temperature``.

    All other arguments are the settings of :class:`fasttrain.config.settings.TrainConfig` and the view and pixel flags;
    None leaves the recipe's value. Arguments override ``config``, which overrides the recipe.

    Under ``torchrun`` or ``deepspeed`` every rank calls it and gets the same result.

    Raises:
        ImportError: the ``train`` extra is not installed.
        ConfigError, DataError: invalid input (both are ValueError).
        Diverged: the loss or its gradient stay not finite.
        Collapsed: the representation collapsed, with ``stop_on_collapse``.
        Interrupted: SIGTERM, Ctrl-C or a notebook's stop button, after a checkpoint was saved. The same call with the
            same ``output_dir`` resumes from it.
        Crashed: any other error.

    Source: docs/methods.md lists the papers of the methods; the bound is arXiv 2307.10907, equation 2.
    """
    arguments = dict(locals())  # the signature's own names and values, before any other local variable
    from .distributed.world import World, initialise, prepare_environment

    prepare_environment()
    try:
        from .config.resolve import read_yaml, resolve
        from .config.settings import IN_MEMORY, MODULE, PixelFlags, TrainConfig, ViewFlags
        from .distributed.watchdog import starting
        from .engine.zero import quiet_deepspeed
        from .methods import load_plugin
        from .methods.registry import name_of
        from .pipelines.sources.in_memory import as_paths, in_memory_splits
        from .pretrained import from_run
        from .report.write import write_report
        from .training.opening import open_together
        from .training.records import output_folder, read_lines
        from .training.trainer import train as run
    except ModuleNotFoundError as error:
        raise ImportError(f"fasttrain.train needs {error.name}. Install it: pip install 'fasttrain[train]'") from error

    quiet_deepspeed()
    world = World.from_environment()
    if not (model is None or callable(model)):
        raise ConfigError(f"model: must be a module or a function of the number of channels, got {model!r}.")
    if plugin is not None:
        if not isinstance(plugin, str | os.PathLike):
            raise ConfigError(f"plugin: must be the path of a Python file, got {plugin!r}.")
        load_plugin(plugin)
    names = {field.name for cls in (TrainConfig, ViewFlags, PixelFlags) for field in dataclasses.fields(cls)} | {
        "recipe",
        "entropy",
    }
    values: dict[str, Any] = {name: arguments[name] for name in names} | method_settings
    data, val = data if data is not None else data_path, val if val is not None else val_path
    splits = in_memory_splits(data, val, data_weights or ())
    if splits is not None:
        values["data_path"] = IN_MEMORY + splits.name
    else:
        values |= {"data_path": as_paths(data), "val_path": as_paths(val)}
    if model is not None:
        values["arch"] = MODULE + getattr(type(model), "__name__", "model")
    values = {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in values.items()
        if value is not None
    }
    file = None if config is None else read_yaml(config)
    settings = resolve(name_of(method), values, file, plugin=None if plugin is None else os.fspath(plugin))
    with starting(world, settings.train.watchdog_minutes):
        initialise(world)
    output = output_folder(settings, world)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, output_dir=str(output)))
    splits = splits or open_together(settings.train, output / "index", world)
    outcome = run(settings, world, splits, network=model)
    if world.is_main and outcome.steps:
        write_report([output], images=0)
    backbone = from_run(output, network=_untrained(model, outcome.config))
    assert backbone.checkpoint is not None
    metrics = tuple(read_lines(output / "metrics.jsonl")[0])
    return Result(backbone.network, metrics, outcome.summary, outcome.config, splits, output, backbone.checkpoint)


def _untrained(model: nn.Module | Callable[[int], nn.Module] | None, config: Config) -> nn.Module | None:
    """Return a module of the user's backbone, to load the trained weights into."""
    if model is None:
        return None
    from .models.architectures import user_backbone

    return user_backbone(model, config.views.channels, config.views.views[0].size)
