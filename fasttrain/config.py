"""The configuration of a run: method's defaults < recipe < YAML file < flags, checked once, then never changed."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from pydantic import TypeAdapter, ValidationError

from . import methods
from .flags import flag
from .optimizers import NAMES as OPTIMIZERS
from .pipelines.views import View, ViewRecipe

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class ConfigError(ValueError):
    """A setting that cannot be used. One line: what is wrong and what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """The trainer's flags; names and defaults are facebookresearch/dino's where it has them."""

    arch: str = flag("vit_small", "network: conv_small, vit_tiny|small|base|large, or any timm model")
    patch_size: int = flag(16, "pixels of a ViT's patch")
    drop_path_rate: float = flag(0.1, "stochastic depth of the student")

    optimizer: str = flag("adamw", "one of " + ", ".join(OPTIMIZERS))
    lr: float = flag(5e-4, "peak learning rate for a global batch of 256, scaled linearly with it")
    min_lr: float = flag(1e-6, "learning rate at the end")
    warmup_epochs: float = flag(10.0, "epochs of linear warm-up")
    weight_decay: float = flag(0.04, "weight decay at the start")
    weight_decay_end: float = flag(0.4, "weight decay at the end (cosine)")
    clip_grad: float = flag(3.0, "largest global norm of the gradient; 0 for none (DINO clips each parameter's)")
    epochs: int = flag(100, "epochs")
    batch_size_per_gpu: int = flag(64, "images a rank and micro-step")
    gradient_accumulation_steps: int = flag(1, "micro-steps an optimizer step")

    global_crops_size: int | None = flag(None, "pixels of a global view")
    global_crops_scale: tuple[float, float] | None = flag(None, "area of a global crop, as a fraction: MIN MAX")
    local_crops_number: int | None = flag(None, "number of local views")
    local_crops_size: int | None = flag(None, "pixels of a local view")
    local_crops_scale: tuple[float, float] | None = flag(None, "area of a local crop, as a fraction: MIN MAX")

    data_path: str | None = flag(None, "folder of images; without it, the embedded digits")
    val_path: str | None = flag(None, "folder of held-out images for k-NN, if data_path has no train/ and val/")
    output_dir: str | None = flag(None, "where the run is written; default runs/<method>[-er]-<time>")
    num_workers: int | None = flag(None, "threads that decode and augment; default: this rank's share of the cores")

    zero_stage: Literal[0, 1, 2, 3] | None = flag(None, "ZeRO stage; default: the lowest that fits")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "auto: bf16 on GPUs that have it, else fp32")
    seed: int = flag(0, "seed of weights, order and views")
    deterministic: bool = flag(False, "deterministic kernels throughout")

    resume: str = flag("auto", "auto (the newest checkpoint in output_dir), never, or a run or checkpoint folder")
    saveckp_freq: int = flag(20, "epochs between checkpoints that are kept")
    saveckp_freq_steps: int = flag(0, "steps between checkpoints; 0: by epochs only")
    limit_steps: int | None = flag(None, "stop after this many steps of the schedule")
    log_every: int = flag(10, "steps between logged steps")
    knn_every: int = flag(10, "epochs between k-NN evaluations; 0: only at the end")


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
        for name in _VIEW_FLAGS:  # already part of the views below
            flat.pop(name)
        for key in ("channels", "mean", "std", "interpolation"):
            flat[key] = getattr(self.views, key)
        flat["views"] = [dataclasses.asdict(view) for view in self.views.views]
        return yaml.safe_dump(_plain(flat), sort_keys=False)


_VIEW_FLAGS = (
    "global_crops_size",
    "global_crops_scale",
    "local_crops_number",
    "local_crops_size",
    "local_crops_scale",
)


@dataclass(frozen=True)
class _ViewSettings:
    """The part of a recipe that says what the views are; a list, so it has no flags of its own but DINO's five."""

    views: tuple[View, ...] = ()
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = field(default=_IMAGENET_MEAN)
    std: tuple[float, ...] = field(default=_IMAGENET_STD)
    interpolation: Literal["linear", "cubic"] = "cubic"


def parse(arguments: Sequence[str]) -> tuple[Config, bool]:
    """Read the command line; returns the configuration and whether ``--print_config`` was given.

    Raises ConfigError for anything that cannot be used, with the nearest right name where there is one.
    """
    arguments = [_underscored(a) for a in arguments]
    first, _ = _parser(None).parse_known_args(arguments)
    file = _read_yaml(Path(first.config)) if first.config else {}
    name = first.method or file.get("method")
    if name is None:
        if first.help:
            _parser(None).show_help()
        raise ConfigError(f"--method is missing; choose one of {', '.join(methods.names())}")
    try:
        method = methods.load(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    given = vars(_parser(method).parse_args(arguments))
    special = {k: given.pop(k) for k in ("method", "config", "print_config", "local_rank", "help")}
    values = {k: v for k, v in given.items() if v is not None}
    return resolve(name, values, file), special["print_config"]


def resolve(name: str, values: Mapping[str, Any], file: Mapping[str, Any] | None = None) -> Config:
    """Merge the method's defaults, the recipe, a YAML file's content and given values, in rising precedence."""
    method = methods.load(name)
    file = dict(file or {})
    if (written := file.pop("method", name)) != name:
        raise ConfigError(f"the configuration file is for method {written!r}, the command for {name!r}")
    data_path = values.get("data_path", file.get("data_path"))
    recipe = values.get("recipe", file.get("recipe", "demo" if data_path is None else "imagenet"))
    entropy = values.get("entropy", file.get("entropy", False))
    if not isinstance(entropy, bool):
        raise ConfigError(f"--entropy is either true or false, got {entropy!r}")
    layers = [dict(method.defaults), load_recipe(recipe, name, entropy), file, dict(values)]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    for key in ("recipe", "entropy"):
        merged.pop(key, None)
    parts = {cls: {f.name for f in dataclasses.fields(cls)} for cls in (TrainConfig, method.Settings, _ViewSettings)}
    for key in merged:
        if not any(key in names for names in parts.values()):
            raise ConfigError(_unknown(f"setting {key!r}", key, sorted(set().union(*parts.values()))))
    for key in (key for view in merged.get("views") or () if isinstance(view, dict) for key in view):
        if key not in View.__dataclass_fields__:
            raise ConfigError(_unknown(f"views: setting {key!r}", key, list(View.__dataclass_fields__)))
    train, settings, views = (
        _validated(cls, {k: merged[k] for k in names if k in merged}) for cls, names in parts.items()
    )
    _check(train)
    chosen = views.views or method.views
    try:
        view_recipe = ViewRecipe(
            views=_with_view_flags(tuple(chosen), train),
            channels=views.channels,
            mean=views.mean,
            std=views.std,
            interpolation=views.interpolation,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Config(name, entropy, recipe, train, settings, view_recipe)


def recipe_names(method: str) -> list[str]:
    """The recipes that have a file for this method; ``imagenet``, the paper's own values, always exists."""
    root = resources.files(__package__) / "recipes"
    found = [r.name for r in root.iterdir() if r.is_dir() and (r / f"{method}.yaml").is_file()]
    return sorted({*found, "imagenet"})


def load_recipe(recipe: str, method: str, entropy: bool) -> dict[str, Any]:
    """The values of ``recipes/<recipe>/<method>.yaml``; its ``with_entropy`` part is laid over them for the twin."""
    if recipe not in recipe_names(method):
        raise ConfigError(f"recipe {recipe!r} is unknown for {method}; choose one of {', '.join(recipe_names(method))}")
    path = resources.files(__package__) / "recipes" / recipe / f"{method}.yaml"
    if not path.is_file():
        return {}
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    twin = values.pop("with_entropy", {})
    return values | twin if entropy else values


def _with_view_flags(views: tuple[View, ...], train: TrainConfig) -> tuple[View, ...]:
    """Lay DINO's five view flags over a recipe's views."""
    size = {False: train.global_crops_size, True: train.local_crops_size}
    scale = {False: train.global_crops_scale, True: train.local_crops_scale}
    changed = []
    for view in views:
        values: dict[str, Any] = {"size": size[view.local], "scale": scale[view.local]}
        if view.local:
            values["count"] = train.local_crops_number or None  # 0: left out below
        changed.append(dataclasses.replace(view, **{k: v for k, v in values.items() if v is not None}))
    if train.local_crops_number == 0:
        changed = [view for view in changed if not view.local]
    return tuple(changed)


def _check(train: TrainConfig) -> None:
    """What a type cannot say."""
    if train.optimizer not in OPTIMIZERS:
        raise ConfigError(_unknown(f"optimizer {train.optimizer!r}", train.optimizer, list(OPTIMIZERS)))
    counts = "epochs batch_size_per_gpu gradient_accumulation_steps log_every patch_size saveckp_freq limit_steps"
    for name, least in [*((n, 1) for n in counts.split()), ("saveckp_freq_steps", 0), ("knn_every", 0), ("seed", 0)]:
        value = getattr(train, name)
        if value is not None and not least <= value < 2**63:
            raise ConfigError(f"--{name} must be at least {least} and below 2**63, got {value}")
    for name in ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad", "drop_path_rate"):
        if not 0 <= getattr(train, name) < float("inf"):
            raise ConfigError(f"--{name} must be a finite number of at least 0, got {getattr(train, name)}")


def _validated(cls: type[Any], values: Mapping[str, Any]) -> Any:
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"--{where}: {first['msg'].lower()}, got {first['input']!r}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold 'name: value' lines")
    return content


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML that needs no Python tags."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _underscored(argument: str) -> str:
    """``--batch-size-per-gpu=8`` as ``--batch_size_per_gpu=8``; values keep their dashes."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _unknown(what: str, name: object, known: list[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"{what} is unknown; did you mean {close[0]}?" if close else f"{what} is unknown; --help lists them all"


class _Parser(argparse.ArgumentParser):
    """Errors are ConfigErrors of one line; unknown flags get the nearest right name."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            message = _unknown(f"argument {name}", name.lstrip("-"), known)
            raise ConfigError(message.replace("did you mean ", "did you mean --"))
        if parsed.help:
            self.show_help()
        return parsed

    def show_help(self) -> NoReturn:
        self.print_help()
        raise SystemExit(0)


def _parser(method: type[methods.Method] | None) -> _Parser:
    parser = _Parser(
        prog="fasttrain train",
        description="Train a backbone by multi-view self-supervision. Without --data_path: on the embedded digits.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this page (with --method M, M's flags too)")
    parser.add_argument("--method", metavar="M", help="one of " + ", ".join(methods.names()))
    parser.add_argument(
        "--entropy", nargs="?", const=True, type=_yes_or_no, help="optimise the entropy-reconstruction bound instead"
    )
    parser.add_argument("--recipe", metavar="NAME", help="demo, cifar, imagenet: a set of published or tried values")
    parser.add_argument("--config", metavar="FILE", help="YAML file, as a run's config.yaml")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers inject it; the environment says it too
    _add_flags(parser.add_argument_group("trainer"), TrainConfig)
    if method is not None:
        _add_flags(parser.add_argument_group(method.__name__), method.Settings)
    return parser


def _add_flags(group: argparse._ArgumentGroup, cls: type[Any]) -> None:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = _without_none(hints[f.name])
        options: dict[str, Any] = {"help": f"{f.metadata['help']} (default: {f.default})"}
        if kind is bool:
            options |= {"nargs": "?", "const": True, "type": _yes_or_no, "metavar": "true|false"}
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": len(typing.get_args(kind)), "type": float, "metavar": "X"}
        else:
            options["metavar"] = f.name.rpartition("_")[2].upper()
            options["type"] = {int: int, float: float}.get(kind, _literal if typing.get_origin(kind) else str)
        group.add_argument(f"--{f.name}", **options)


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _literal(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _yes_or_no(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
