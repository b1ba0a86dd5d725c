"""The configuration of a run: the paper's values < recipe < YAML file < flags, checked once, then never changed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from .. import methods
from ..errors import ConfigError, unknown_name
from ..flags import demand, flag
from ..optim.optimizers import NAMES as OPTIMIZERS
from ..pipelines.views.recipe import View, ViewRecipe
from .recipes import recipe_layers

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

IN_MEMORY = "in memory: "
"""Begins the ``data_path`` of a run whose images have none, so that nobody takes others for them."""


@dataclass(frozen=True)
class TrainConfig:
    """The trainer's flags; names and defaults are facebookresearch/dino's where it has them."""

    arch: str = flag("vit_small", "network: conv_small, vit_tiny|small|base|large, or any timm model")
    patch_size: int | None = flag(
        None, "pixels of a ViT's patch, if not as its name says; vit_small and the like: 16", least=1
    )
    num_heads: int | None = flag(None, "attention heads of a ViT, if not its usual number", least=1)
    activation_checkpointing: bool = flag(False, "recompute blocks in backward: less memory, slower")
    drop_path_rate: float = flag(0.1, "stochastic depth of the student", least=0, most=1)

    optimizer: str = flag("adamw", "one of " + ", ".join(OPTIMIZERS))
    lr: float = flag(5e-4, "peak learning rate for a global batch of 256, scaled linearly with it", least=0)
    min_lr: float = flag(1e-6, "learning rate at the end", least=0)
    lr_drops: tuple[float, ...] = flag((), "epochs at which the learning rate falls to a tenth, in place of the cosine")
    warmup_epochs: float = flag(10.0, "epochs of linear warm-up", least=0)
    weight_decay: float = flag(0.04, "weight decay at the start", least=0)
    weight_decay_end: float = flag(0.4, "weight decay at the end (cosine)", least=0)
    decay_all: bool = flag(False, "weight decay on biases and norms too")
    clip_grad: float = flag(3.0, "largest norm of the gradient, of all parameters together; 0 for none", least=0)
    clip_each: bool = flag(False, "clip every parameter's gradient for itself, as DINO does")
    epochs: int = flag(100, "epochs", least=1)
    batch_size_per_gpu: int = flag(64, "images a rank and micro-step", least=1)
    gradient_accumulation_steps: int = flag(1, "micro-steps an optimizer step", least=1)

    global_crops_size: int | None = flag(None, "pixels of a global view")
    global_crops_scale: tuple[float, float] | None = flag(None, "area of a global crop, as a fraction: MIN MAX")
    local_crops_number: int | None = flag(None, "number of local views")
    local_crops_size: int | None = flag(None, "pixels of a local view")
    local_crops_scale: tuple[float, float] | None = flag(None, "area of a local crop, as a fraction: MIN MAX")

    data_path: str | None = flag(None, "folder or shards of images, see README; without it, the embedded digits")
    val_path: str | None = flag(None, "held-out images for k-NN, if data_path has no train/ and val/")
    output_dir: str | None = flag(None, "where the run is written; default runs/<method>[-er]-<time>")
    num_workers: int | None = flag(
        None, "threads that decode and augment; default: this rank's share of the cores", least=0
    )
    max_bad_fraction: float = flag(
        0.1, "stop, with exit status 2, when more of the images cannot be read", least=0, most=1
    )

    zero_stage: Literal[0, 1, 2, 3] | None = flag(None, "ZeRO stage; default: the lowest that fits")
    overlap_comm: bool | None = flag(None, "reduce gradients beside the backward pass; default: at ZeRO 3 only")
    offload_optimizer: bool = flag(False, "optimizer's state and step in host memory: ZeRO 1 to 3")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "auto: bf16 on GPUs that have it, else fp32")
    seed: int = flag(0, "seed of weights, order and views", least=0)
    deterministic: bool = flag(False, "deterministic kernels throughout")

    init_from: str | None = flag(
        None, "file of weights that the backbone starts from: timm's, lightly's, DINO's or ours"
    )
    resume: str = flag("auto", "auto (the newest checkpoint in output_dir), never, or a run or checkpoint folder")
    saveckp_freq: int = flag(20, "epochs between checkpoints that are kept", least=1)
    keep: int | None = flag(
        None, "newest checkpoints that stay; default: all of --saveckp_freq, and the newest", least=1
    )
    saveckp_freq_steps: int = flag(0, "steps between checkpoints; 0: after every epoch only", least=0)
    limit_steps: int | None = flag(None, "stop after this many steps of the schedule", least=1)
    log_every: int = flag(10, "steps between logged steps", least=1)
    max_skipped_steps: int = flag(
        3, "stop, with exit status 3, after so many steps in a row that are not finite", least=1
    )
    rollback: int = flag(
        0, "go back to the last checkpoint, with another data order, instead; at most so often", least=0
    )
    watchdog_minutes: float = flag(
        30.0, "end the run, with exit status 1, if no step finishes for so long; 0: never", least=0
    )
    stop_on_collapse: bool = flag(False, "stop, with exit status 3, when the representation has collapsed")
    knn_every: int = flag(10, "epochs between k-NN evaluations; 0: only at the end", least=0)

    @property
    def in_memory(self) -> bool:
        """Whether the images have no path, but came as a data set from Python."""
        return (self.data_path or "").startswith(IN_MEMORY)


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    method: str
    entropy: bool
    recipe: str
    train: TrainConfig
    settings: Any
    """The method's own settings: an instance of its ``Settings``."""
    views: ViewRecipe

    def to_yaml(self) -> str:
        """The flat form that ``--config`` reads back into the same configuration."""
        flat: dict[str, Any] = {"method": self.method, "entropy": self.entropy, "recipe": self.recipe}
        flat |= dataclasses.asdict(self.train) | dataclasses.asdict(self.settings)
        for name in VIEW_FLAGS:  # already part of the views below
            flat.pop(name)
        for key in ("channels", "color_space", "mean", "std", "interpolation"):
            flat[key] = getattr(self.views, key)
        flat["views"] = [dataclasses.asdict(view) for view in self.views.views]
        return yaml.safe_dump(_plain(flat), sort_keys=False)

    def anywhere(self) -> Config:
        """The same with whole paths of the images, which mean the same in every folder."""
        if self.train.in_memory:
            return self
        paths = {name: getattr(self.train, name) for name in ("data_path", "val_path")}
        whole = {name: os.path.abspath(os.path.expanduser(path)) for name, path in paths.items() if path}
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **whole))


VIEW_FLAGS = ("global_crops_size", "global_crops_scale", "local_crops_number", "local_crops_size", "local_crops_scale")


@dataclass(frozen=True)
class _ViewSettings:
    """The part of a recipe that says what the views are; a list, so it has no flags of its own but DINO's five."""

    views: tuple[View, ...] = ()
    channels: Literal[1, 3] = 3
    color_space: Literal["rgb", "lab", "ycbcr"] = "rgb"
    mean: tuple[float, ...] = field(default=_IMAGENET_MEAN)
    std: tuple[float, ...] = field(default=_IMAGENET_STD)
    interpolation: Literal["linear", "cubic"] = "cubic"


def resolve(name: str, values: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> Config:
    """Merge the paper's values, the recipe, a YAML file's content and given values, in rising precedence."""
    try:
        method = methods.load(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    file = dict(file or {})
    if (written := file.pop("method", name)) != name:
        raise ConfigError(f"the configuration file is for method {written!r}, the command for {name!r}")
    data_path = values.get("data_path", file.get("data_path"))
    recipe = values.get("recipe", file.get("recipe", "demo" if data_path is None else "imagenet"))
    entropy = values.get("entropy", file.get("entropy", False))
    if not isinstance(entropy, bool):
        raise ConfigError(f"--entropy is either true or false, got {entropy!r}")
    try:
        layers = [*recipe_layers(recipe, name, entropy), file, dict(values)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    for key in ("recipe", "entropy"):
        merged.pop(key, None)
    parts = {cls: {f.name for f in dataclasses.fields(cls)} for cls in (TrainConfig, method.Settings, _ViewSettings)}
    for key in merged:
        if not any(key in names for names in parts.values()):
            raise ConfigError(unknown_name(f"setting {key!r}", key, sorted(set().union(*parts.values()))))
    listed = merged.get("views")
    for view in listed if isinstance(listed, list) else ():
        for key in view if isinstance(view, dict) else ():
            if key not in View.__dataclass_fields__:
                raise ConfigError(unknown_name(f"views: setting {key!r}", key, list(View.__dataclass_fields__)))
    train, settings, views = (
        _validated(cls, {k: merged[k] for k in names if k in merged}) for cls, names in parts.items()
    )
    _check(train)
    try:
        kept = {f.name: getattr(views, f.name) for f in dataclasses.fields(views)}
        view_recipe = ViewRecipe(**kept | {"views": _with_view_flags(views.views, train)})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Config(name, entropy, recipe, train, settings, view_recipe)


def _with_view_flags(views: tuple[View, ...], train: TrainConfig) -> tuple[View, ...]:
    """Lay DINO's five view flags over a recipe's views."""
    size = {False: train.global_crops_size, True: train.local_crops_size}
    scale = {False: train.global_crops_scale, True: train.local_crops_scale}
    changed = []
    for view in views:
        values: dict[str, Any] = {"size": size[view.local], "scale": scale[view.local]}
        values["count"] = (train.local_crops_number or None) if view.local else None  # 0: left out below
        changed.append(dataclasses.replace(view, **{k: v for k, v in values.items() if v is not None}))
    if not any(view.local for view in views):
        given = [name for name in VIEW_FLAGS if name.startswith("local") and getattr(train, name)]
        if given:
            raise ConfigError(
                f"--{given[0]}: the recipe has no local views to change; list some under views: in --config"
            )
    if train.local_crops_number == 0:
        changed = [view for view in changed if not view.local]
    return tuple(changed)


def _check(train: TrainConfig) -> None:
    """What a type cannot say."""
    if train.optimizer not in OPTIMIZERS:
        raise ConfigError(unknown_name(f"optimizer {train.optimizer!r}", train.optimizer, list(OPTIMIZERS)))
    if train.seed >= 2**63:
        raise ConfigError(f"--seed must be below 2**63, got {train.seed}")
    if train.zero_stage == 0 and (train.offload_optimizer or train.overlap_comm):
        name = "offload_optimizer" if train.offload_optimizer else "overlap_comm"
        raise ConfigError(f"--{name} is for --zero_stage 1, 2 and 3, got 0; leave it out or raise the stage")


def _validated(cls: type[Any], values: Mapping[str, Any]) -> Any:
    try:
        made = TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--{where}: {first['msg'].lower()}, got {first['input']!r}") from None
    for f in dataclasses.fields(made):
        value = getattr(made, f.name)
        if f.metadata and isinstance(value, int | float) and (asked := demand(value, f.metadata)):
            raise ConfigError(f"--{f.name} must be {asked}, got {value}")
    return made


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML that needs no Python tags."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
