"""Load a trained backbone from a run, an exported file or timm, and describe how to build it again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import TypeAdapter, ValidationError
from timm.data import resolve_model_data_config
from torch import nn

from .checkpoint.card import newest, read_card
from .checkpoint.state import whole_tensors
from .config.resolve import Config, load_method, read_yaml, resolve
from .config.settings import MODULE
from .errors import ConfigError, unknown_name
from .flags import user_path
from .models.architectures import create_backbone, create_timm, has_cifar_stem, has_one_size, timm_name, vit_options
from .models.sensors import Sensors
from .models.weights import load_weights, read_metadata, read_weights
from .pipelines import Pixels, Size, View, ViewRecipe, sides, size_text

Branch = Literal["teacher", "student"]


@dataclass(frozen=True)
class Blueprint:
    """How to build a backbone, and its pixel format. An exported file carries it."""

    arch: str
    size: Size
    """Side of an image in pixels, or its height and width."""
    stock: bool = False
    """Whether it is the network of ``timm.create_model(arch)``, unchanged."""
    encoders: tuple[int, ...] = (3,)
    """Input channels of each encoder; CMC has two."""
    patch_size: int | None = None
    num_heads: int | None = None
    pixels: Pixels = Pixels()

    def build(self) -> nn.Module:
        """Return the network, untrained. Raise ConfigError for an unknown name."""
        if self.arch.startswith(MODULE):
            raise ConfigError(
                f"the backbone was a Python module ({self.arch.removeprefix(MODULE)}), which no command can build. "
                "Load it in Python: fasttrain.pretrained.from_run(RUN, network=module)"
            )
        try:
            if self.stock:
                return _stock(self.arch, self.size)
            encoders = [self._encoder(channels) for channels in self.encoders]
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if len(encoders) == 1:
            return encoders[0]
        remaining = iter(encoders)
        return Sensors(lambda _: next(remaining), self.encoders, self.pixels.color_space != "rgb")

    def _encoder(self, channels: int) -> nn.Module:
        return create_backbone(
            self.arch, in_chans=channels, img_size=self.size, patch_size=self.patch_size, num_heads=self.num_heads
        )

    @property
    def recipe(self) -> ViewRecipe:
        """A recipe of one view of the network's size, in its pixel format."""
        return ViewRecipe((View(size=self.size),), pixels=self.pixels)

    @classmethod
    def of(cls, config: Config) -> Blueprint:
        """Return the blueprint of a run's backbone."""
        t, views = config.train, config.views
        return cls(
            arch=t.arch,
            size=views.views[0].size,
            encoders=load_method(config.method, config.plugin).encoder_channels(views),
            patch_size=t.patch_size,
            num_heads=t.num_heads,
            pixels=views.pixels,
        )

    @classmethod
    def read(cls, values: Mapping[str, Any], path: Path) -> Blueprint:
        """Return the blueprint from the values of :meth:`as_dict` in a file. Raise ConfigError if they are invalid."""
        names = {field.name for field in fields(Pixels)}
        pixels = {name: value for name, value in values.items() if name in names}
        others = {name: value for name, value in values.items() if name not in names}
        try:
            blueprint: Blueprint = TypeAdapter(cls).validate_python(others | {"pixels": pixels})
            _ = blueprint.recipe
            return blueprint
        except ValidationError as error:
            reason = error.errors()[0]["msg"].lower()
        except ValueError as error:
            reason = str(error)
        raise ConfigError(f"{path}: does not describe its network: {reason}. Export it again.")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without nesting."""
        values = asdict(self)
        pixels: dict[str, Any] = values.pop("pixels")
        return values | pixels


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode, and its origin."""

    network: nn.Module
    blueprint: Blueprint
    name: str
    """A description for people."""
    config: Config | None = None
    """The configuration of the run that trained it."""
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    """The report of the weights of another project: what was mapped, resampled and dropped."""

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)


def from_run(path: str | Path, which: Branch | None = None, *, network: nn.Module | None = None) -> Backbone:
    """Return the backbone of a run's newest checkpoint, or of one of its checkpoints, from any ZeRO stage.

    ``which`` selects the teacher's or the student's backbone; the default is the teacher, if the method has one.
    ``network`` is the module that was trained with ``fasttrain.train(model=...)``; it is copied. Raise ConfigError for
    a run without a complete checkpoint, a corrupt checkpoint, and a teacher that the method does not have.
    """
    folder = newest(user_path(path))
    card, file = read_card(folder), folder.parent.parent / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{file}: is missing, so the run's network is unknown. Give the folder of a whole run.")
    values = read_yaml(file)
    config = resolve(str(values.get("method", card.method)), {}, values)
    has_teacher = load_method(config.method, config.plugin).has_teacher
    if which == "teacher" and not has_teacher:
        raise ConfigError(f"--which: {config.method} has no teacher. Leave it out or choose student.")
    branch = which or ("teacher" if has_teacher else "student")
    blueprint = Blueprint.of(config)
    built = blueprint.build() if network is None else copy.deepcopy(network)
    load_weights(built, whole_tensors(folder, f"{branch}.backbone."), f"checkpoint {folder}")
    return Backbone(built, blueprint, f"{config.title} {branch}, step {card.step}", config, folder)


def from_file(path: str | Path) -> Backbone:
    """Return the backbone of a file that ``fasttrain export`` wrote. Raise ConfigError for any other file."""
    path = user_path(path)
    values = read_metadata(path) if path.is_file() else None
    if values is None:
        tensors = read_weights(path)  # it reports why a file cannot be read
        raise ConfigError(
            f"{path}: holds {len(tensors)} tensors but no description of the network. "
            f"Use --timm NAME --pretrained {path}."
        )
    blueprint = Blueprint.read(values, path)
    network = blueprint.build()
    load_weights(network, read_weights(path), str(path))
    return Backbone(network, blueprint, path.name)


def from_timm(name: str, *, pretrained: Path | None = None, size: Size | None = None, seed: int = 0) -> Backbone:
    """Return a timm model, unchanged, with the weights of a file or random ones. Nothing is downloaded.

    ``size`` is the side of the images in pixels, or their height and width, if it differs from timm's for the model.
    Images are normalised as a file of ours says, else as timm says for the name: ``vit_small_patch16_224.dino`` is
    normalised for DINO's weights, ``vit_small_patch16_224`` for others. Raise ConfigError for an unknown name and for
    weights of another network.
    """
    if not timm.is_model(name):
        raise ConfigError(unknown_name(f"timm model {name!r}", name, timm.list_models()))
    torch.manual_seed(seed)
    network = _stock(name, size)
    data = resolve_model_data_config(network)
    blueprint = Blueprint(
        arch=name,
        size=size or View(tuple(data["input_size"][1:])).size,
        stock=True,
        pixels=Pixels(
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            interpolation="linear" if data["interpolation"] == "bilinear" else "cubic",
        ),
    )
    notes: list[str] = []
    if pretrained is not None:
        pretrained = user_path(pretrained)
        notes = load_weights(network, read_weights(pretrained), str(pretrained)).lines()
        if values := read_metadata(pretrained):
            ours = Blueprint.read(values, pretrained).pixels
            pixels = replace(blueprint.pixels, mean=ours.mean, std=ours.std, interpolation=ours.interpolation)
            blueprint = replace(blueprint, pixels=pixels)
    origin = pretrained.name if pretrained else f"random, seed {seed}"
    return Backbone(network, blueprint, f"timm {name}, {origin}", notes=tuple(notes))


def _stock(name: str, size: Size | None) -> nn.Module:
    """Return ``timm.create_model`` without a classifier, built for the size if the model has a fixed one."""
    try:
        network = create_timm(name)
        default = tuple(resolve_model_data_config(network)["input_size"][1:])
        if size is not None and sides(size) != default and has_one_size(name):
            network = create_timm(name, img_size=size)
        return network
    except ValueError as error:
        raise ConfigError(str(error) if size is None else f"{error} (for images of {size_text(size)} pixels)") from None


def timm_arguments(blueprint: Blueprint) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments with which ``timm.create_model`` builds the same network.

    Raise ConfigError for networks that timm does not have: ours, CMC's pairs, and ResNets with CIFAR's stem.
    """
    b = blueprint
    name, network = timm_name(b.arch), b.arch
    if len(b.encoders) > 1:
        network = f"CMC's pair of {b.arch}"
    elif name is not None and b.stock:
        default = tuple(resolve_model_data_config(create_timm(name))["input_size"][1:])
        return name, {"img_size": b.size} if has_one_size(name) and sides(b.size) != default else {}
    elif name is not None:
        built = b.build()
        if not has_cifar_stem(built):
            options: dict[str, Any] = {} if b.encoders == (3,) else {"in_chans": b.encoders[0]}
            vit = name.startswith("vit_")
            if vit or has_one_size(name) or getattr(built, "dynamic_img_size", False):
                options["img_size"] = b.size
            if vit:
                options |= vit_options(b.patch_size, b.num_heads)
            return name, options
        network = f"{b.arch} with CIFAR's stem, for images of {size_text(b.size)} pixels,"
    raise ConfigError(f"--format: {network} is not one of timm's networks. Use --format safetensors or onnx.")
