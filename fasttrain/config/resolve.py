"""The configuration of a run, merged once from the paper's values < recipe < YAML file < flags."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

import yaml

from .. import methods
from ..errors import ConfigError, unknown_name
from ..flags import size_of, user_path, validated
from ..optim.optimizers import NAMES as OPTIMIZERS
from ..pipelines.sources.hugging_face import PREFIX as HUGGING_FACE
from ..pipelines.sources.mixture import check_weights
from ..pipelines.views.recipe import MOST_CHANNELS, Pixels, View, ViewRecipe
from .recipes import recipe_layers, recipe_names
from .settings import PixelFlags, TrainConfig, ViewFlags

COMMAND_FLAGS = ("method", "config", "plugin", "print_config", "local_rank", "help")
"""Flags of ``fasttrain train`` that are no settings of the run."""


@dataclass(frozen=True)
class Request:
    """The values that the caller gave, before the recipe's were merged under them."""

    values: Mapping[str, Any]
    file: Mapping[str, Any]

    @property
    def pixels(self) -> frozenset[str]:
        """Fields of the pixel format among them. The images may decide the others."""
        stated = {**self.file, **self.values}
        ends = stated.get("pixel_range")
        per_channel = isinstance(ends, list | tuple) and len(ends) > 2  # MIN MAX of each
        return frozenset(_names(Pixels) & stated.keys()) | ({"channels"} if per_channel else set())


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    method: str
    entropy: bool
    recipe: str
    train: TrainConfig
    settings: Any
    """The method's own settings: an instance of its ``Settings``."""
    views: ViewRecipe
    plugin: str | None = None
    """The file that registered the method. It is only recorded: a stored configuration never runs code."""
    request: Request | None = field(default=None, compare=False, repr=False)
    """What :func:`fasttrain.config.fit.fit_to_data` may not change."""

    @property
    def title(self) -> str:
        """The method's name, with ``+ER`` for its entropy-reconstruction twin."""
        return self.method + ("+ER" if self.entropy else "")

    def to_yaml(self) -> str:
        """Return the flat form, from which ``--config`` makes the same configuration."""
        flat: dict[str, Any] = {"method": self.method, "entropy": self.entropy, "recipe": self.recipe}
        flat |= {} if self.plugin is None else {"plugin": self.plugin}
        flat |= dataclasses.asdict(self.train) | dataclasses.asdict(self.settings)
        flat |= dataclasses.asdict(self.views.pixels)
        flat["views"] = [dataclasses.asdict(view) for view in self.views.views]
        return yaml.safe_dump(_plain(flat), sort_keys=False)

    def with_absolute_paths(self) -> Config:
        """Return the configuration with absolute paths of the images, which are valid in every folder."""
        if self.train.in_memory:
            return self
        t = self.train
        paths = dataclasses.replace(t, data_path=_absolute(t.data_path), val_path=_absolute(t.val_path))
        return dataclasses.replace(self, train=paths)


def _absolute(path: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if not isinstance(path, str):
        return None if path is None else tuple(str(_absolute(one)) for one in path)
    prefix = HUGGING_FACE if path.startswith(HUGGING_FACE) else ""
    return path and prefix + os.path.abspath(os.path.expanduser(path.removeprefix(prefix)))


@dataclass(frozen=True)
class _Views:
    """The list of views in a recipe. Only DINO's five values have flags."""

    views: tuple[View, ...] = ()


def resolve(
    name: str, values: Mapping[str, Any], file: Mapping[str, Any] | None = None, *, plugin: str | None = None
) -> Config:
    """Merge the paper's values, the recipe, a YAML file's content and ``values``, in rising precedence.

    Raise ConfigError, which names the setting, for anything invalid.
    """
    file = dict(file or {})
    recorded = file.pop("plugin", None)
    method = load_method(name, recorded if plugin is None else None)
    if (written := file.pop("method", name)) != name:
        raise ConfigError(f"--method: the configuration file is for {written!r}, got {name!r}. Use one of the two.")
    data_path = values.get("data_path", file.get("data_path"))
    recipe = values.get("recipe", file.get("recipe", "demo" if data_path is None else "imagenet"))
    entropy = values.get("entropy", file.get("entropy", False))
    if not isinstance(entropy, bool):
        raise ConfigError(f"--entropy: must be true or false, got {entropy!r}")
    if entropy and method.space is None:
        raise ConfigError(f"--entropy: {name} has no entropy-reconstruction twin. Leave the flag out.")
    sections = {cls: _names(cls) for cls in (TrainConfig, ViewFlags, method.Settings, Pixels, _Views)}
    known = set().union(*sections.values())
    try:
        layers = recipe_layers(recipe, name, entropy, like=method.recipes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if method.recipes is not None:  # another method's recipes hold that method's settings too
        layers = [{key: value for key, value in layer.items() if key in known} for layer in layers]
    merged: dict[str, Any] = {}
    for layer in (*layers, file, dict(values)):
        merged |= layer
    for key in ("recipe", "entropy"):
        merged.pop(key, None)
    _check_names(merged, known)
    request = Request(dict(values), file)
    if "channels" in request.pixels:
        if not {"channels"} & {*file, *values}:
            merged["channels"] = len(merged["pixel_range"]) // 2
        merged |= _moments_to_measure(merged, request.pixels)
    try:
        train, view_flags, settings, pixels, views = (
            validated(cls, {key: merged[key] for key in names if key in merged}) for cls, names in sections.items()
        )
    except ConfigError as error:
        if str(error).partition(":")[0] in _names(PixelFlags):
            raise ConfigError(f"--{error}") from None
        raise
    _check_combinations(train)
    try:
        view_recipe = ViewRecipe(_with_view_flags(views.views, view_flags), pixels=pixels)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return Config(name, entropy, recipe, train, settings, view_recipe, plugin or recorded, request)


def _moments_to_measure(merged: Mapping[str, Any], stated: Collection[str]) -> dict[str, Any]:
    """Return mean and standard deviation for a stated number of channels, if the recipe has them for another number.

    They are the middle of the range and half of the distance to its ends, until the images are measured.
    """
    channels = merged["channels"]
    if not (isinstance(channels, int) and 1 <= channels <= MOST_CHANNELS):
        return {}  # the check of the pixel format reports it
    usual = {"mean": (Pixels.mean, 0.5), "std": (Pixels.std, 0.25)}
    return {
        name: (value,) * channels
        for name, (default, value) in usual.items()
        if name not in stated and len(merged.get(name, default)) != channels
    }


def load_method(name: str, recorded_plugin: str | None = None) -> type[methods.Method]:
    """Return a method's class. Raise ConfigError for an unknown name, with the plugin that a run's file recorded."""
    try:
        method = methods.load(name)
    except ValueError as error:
        hint = f" It was registered by a plugin. Add --plugin {quote(recorded_plugin)}." if recorded_plugin else ""
        raise ConfigError(f"{error}{hint}") from None
    trainers = {*COMMAND_FLAGS, "recipe", "entropy"}.union(*map(_names, (TrainConfig, ViewFlags, Pixels, _Views)))
    if taken := sorted(trainers & _names(method.Settings)):
        raise ConfigError(f"--{taken[0]}: is a setting of the trainer. Rename the field of {method.__name__}.Settings.")
    if method.recipes is None and not recipe_names(name):
        raise ConfigError(f"--method: {name} has no recipes. Set {method.__name__}.recipes to a built-in method.")
    return method


class _UniqueKeys(yaml.SafeLoader):
    """Refuse a key that is written twice. YAML's own rule, that the last one wins, hides a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"{repeated} is written twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the values of a YAML file. Raise ConfigError if it cannot be read or is not a mapping."""
    try:
        content = yaml.load(user_path(path).read_text(), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must contain 'name: value' lines")
    return content


def _names(cls: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _check_names(merged: Mapping[str, Any], known: set[str]) -> None:
    for key in merged:
        if key not in known:
            raise ConfigError(unknown_name(f"setting {key!r}", key, sorted(known)))
    listed = merged.get("views")
    for view in listed if isinstance(listed, list) else ():
        for key in view if isinstance(view, dict) else ():
            if key not in View.__dataclass_fields__:
                raise ConfigError(unknown_name(f"views: setting {key!r}", key, list(View.__dataclass_fields__)))


def _with_view_flags(views: tuple[View, ...], flags: ViewFlags) -> tuple[View, ...]:
    """Apply DINO's five view flags to a recipe's views."""
    size = {False: size_of(flags.global_crops_size), True: size_of(flags.local_crops_size)}
    scale = {False: flags.global_crops_scale, True: flags.local_crops_scale}
    changed = []
    for view in views:
        values: dict[str, Any] = {"size": size[view.local], "scale": scale[view.local]}
        values["count"] = (flags.local_crops_number or None) if view.local else None  # 0 removes the view below
        changed.append(dataclasses.replace(view, **{k: v for k, v in values.items() if v is not None}))
    if not any(view.local for view in views):
        local = [name for name, value in vars(flags).items() if name.startswith("local") and value]
        if local:
            raise ConfigError(f"--{local[0]}: the recipe has no local views. List some under views: in --config.")
    if flags.local_crops_number == 0:
        changed = [view for view in changed if not view.local]
    return tuple(changed)


def _check_combinations(train: TrainConfig) -> None:
    if not train.in_memory:
        check_weights(train.data_weights, max(len(train.data_paths), 1))
    if train.optimizer not in OPTIMIZERS:
        raise ConfigError(unknown_name(f"optimizer {train.optimizer!r}", train.optimizer, list(OPTIMIZERS)))
    if train.zero_stage == 0 and (train.offload_optimizer or train.overlap_comm):
        name = "offload_optimizer" if train.offload_optimizer else "overlap_comm"
        raise ConfigError(f"--{name}: needs --zero_stage 1, 2 or 3, got 0. Leave it out or raise the stage.")


def _plain(value: Any) -> Any:
    """Return tuples as lists, so that the YAML needs no Python tags."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
