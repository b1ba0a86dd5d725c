"""A trained backbone from anywhere: a run's checkpoint, an exported file, or timm; and how to build it again."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import TypeAdapter, ValidationError
from timm.data import resolve_model_data_config
from torch import nn

from . import methods
from .checkpoint.card import newest, read_card
from .checkpoint.state import whole_tensors
from .config.arguments import read_yaml
from .config.settings import Config, resolve
from .errors import ConfigError, unknown_name
from .methods.cmc import Sensors
from .models.architectures import create_backbone, create_timm, has_cifar_stem, has_one_size, timm_name, vit_options
from .models.weights import load_weights, read_metadata, read_weights
from .pipelines import View, ViewRecipe

Which = Literal["teacher", "student"]


@dataclass(frozen=True)
class Blueprint:
    """How to build a backbone, and the pixels that it wants; an exported file carries it."""

    arch: str
    size: int
    """Pixels of the side of an image."""
    stock: bool = False
    """Whether it is timm's network as ``timm.create_model(arch)`` makes it, not one changed for training."""
    encoders: tuple[int, ...] = (3,)
    """Input channels of each encoder; CMC has two."""
    patch_size: int | None = None
    num_heads: int | None = None
    channels: int = 3
    color_space: Literal["rgb", "lab", "ycbcr"] = "rgb"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["linear", "cubic"] = "cubic"

    def build(self) -> nn.Module:
        """The network, untrained. Raises ConfigError for an unknown name."""
        try:
            if self.stock:
                return _stock(self.arch, self.size)
            encoders = [self._encoder(channels) for channels in self.encoders]
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if len(encoders) == 1:
            return encoders[0]
        made = iter(encoders)
        return Sensors(lambda _: next(made), self.encoders, self.color_space != "rgb")

    def _encoder(self, channels: int) -> nn.Module:
        return create_backbone(
            self.arch, in_chans=channels, img_size=self.size, patch_size=self.patch_size, num_heads=self.num_heads
        )

    @property
    def pixels(self) -> ViewRecipe:
        """Normalisation and colours of the images, with one view of the network's size."""
        kept = ("channels", "color_space", "mean", "std", "interpolation")
        return ViewRecipe((View(size=self.size),), **{name: getattr(self, name) for name in kept})

    @classmethod
    def of(cls, config: Config) -> Blueprint:
        """The blueprint of a run's backbone."""
        t, v = config.train, config.views
        return cls(
            arch=t.arch,
            size=v.views[0].size,
            encoders=methods.load(config.method).encoder_channels(v),
            patch_size=t.patch_size,
            num_heads=t.num_heads,
            channels=v.channels,
            color_space=v.color_space,
            mean=v.mean,
            std=v.std,
            interpolation=v.interpolation,
        )

    @classmethod
    def read(cls, about: Mapping[str, Any], path: Path) -> Blueprint:
        """What :meth:`written` says. Raises ConfigError where it cannot be used."""
        try:
            blueprint: Blueprint = TypeAdapter(cls).validate_python(dict(about))
            _ = blueprint.pixels
            return blueprint
        except ValidationError as error:
            why = error.errors()[0]["msg"].lower()
        except ValueError as error:
            why = str(error)
        raise ConfigError(f"{path} does not say how to build its network ({why}); export it again")

    def written(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Backbone:
    """A network in evaluation mode and what is known about it."""

    network: nn.Module
    blueprint: Blueprint
    name: str
    """Where it comes from, for people."""
    config: Config | None = None
    """The configuration of the run that trained it."""
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)


def from_run(path: Path, which: Which | None = None) -> Backbone:
    """The backbone of a run's newest checkpoint, or of one of its checkpoints, from any ZeRO stage.

    ``which`` is the teacher's or the student's; by default the one that the method evaluates. Raises ConfigError for a
    run without a complete checkpoint, one that is damaged, and a teacher that the method does not have.
    """
    folder = newest(path)
    card, file = read_card(folder), folder.parent.parent / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{file} is missing, so the run's network is unknown; give the folder of a whole run")
    values = read_yaml(file)
    config = resolve(str(values.get("method", card.method)), {}, values)
    has_teacher = hasattr(config.settings, "momentum_teacher")  # as every method with a teacher
    if which == "teacher" and not has_teacher:
        raise ConfigError(f"{path}: {config.method} has no teacher; leave --which out or choose student")
    chosen = which or ("teacher" if has_teacher else "student")
    blueprint = Blueprint.of(config)
    network = blueprint.build()
    load_weights(network, whole_tensors(folder, f"{chosen}.backbone."), f"checkpoint {folder}")
    twin = "+ER" if config.entropy else ""
    return Backbone(network, blueprint, f"{config.method}{twin} {chosen}, step {card.step}", config, folder)


def from_file(path: Path) -> Backbone:
    """The backbone of a file that ``fasttrain export`` wrote. Raises ConfigError for any other file."""
    about = read_metadata(path) if path.is_file() else None
    if about is None:
        tensors = read_weights(path)  # says what is wrong with a file that cannot be read
        hint = f"evaluate it as --timm NAME --pretrained {path}"
        raise ConfigError(f"{path} holds {len(tensors)} tensors but does not say of which network; {hint}")
    blueprint = Blueprint.read(about, path)
    network = blueprint.build()
    load_weights(network, read_weights(path), str(path))
    return Backbone(network, blueprint, path.name)


def from_timm(name: str, *, pretrained: Path | None = None, size: int | None = None, seed: int = 0) -> Backbone:
    """A timm model as it is, with the weights of a file, or random ones by the seed; nothing is downloaded.

    ``size`` is that of the images, in pixels, where it is not the one that timm notes for the model. Images are
    normalised as a file of ours says, else as timm notes for the name: ``vit_small_patch16_224.dino`` is normalised as
    DINO's weights want, ``vit_small_patch16_224`` as others. Raises ConfigError for a name that timm does not know, and
    weights of another network.
    """
    if not timm.is_model(name):
        raise ConfigError(unknown_name(f"timm model {name!r}", name, timm.list_models()))
    torch.manual_seed(seed)
    network = _stock(name, size)
    wanted = resolve_model_data_config(network)
    blueprint = Blueprint(
        arch=name,
        size=size or wanted["input_size"][1],
        stock=True,
        mean=tuple(wanted["mean"]),
        std=tuple(wanted["std"]),
        interpolation="linear" if wanted["interpolation"] == "bilinear" else "cubic",
    )
    if pretrained is not None:
        load_weights(network, read_weights(pretrained), str(pretrained))
        if about := read_metadata(pretrained):
            ours = Blueprint.read(about, pretrained)
            blueprint = replace(blueprint, mean=ours.mean, std=ours.std, interpolation=ours.interpolation)
    return Backbone(network, blueprint, f"timm {name}, {pretrained.name if pretrained else f'random, seed {seed}'}")


def _stock(name: str, size: int | None) -> nn.Module:
    """``timm.create_model`` without a classifier, for images of another size where the model must be told."""
    try:
        network = create_timm(name)
        if size not in (None, resolve_model_data_config(network)["input_size"][1]) and has_one_size(name):
            network = create_timm(name, img_size=size)
        return network
    except ValueError as error:
        raise ConfigError(str(error) if size is None else f"{error} (for images of {size} pixels)") from None


def timm_arguments(blueprint: Blueprint) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which ``timm.create_model`` builds the same network.

    Raises ConfigError for those that timm does not have: ours, CMC's pairs, and ResNets with CIFAR's stem.
    """
    b = blueprint
    name, network = timm_name(b.arch), b.arch
    if len(b.encoders) > 1:
        network = f"CMC's pair of {b.arch}"
    elif name is not None and b.stock:
        usual = resolve_model_data_config(create_timm(name))["input_size"][1]
        return name, {"img_size": b.size} if has_one_size(name) and b.size != usual else {}
    elif name is not None:
        made = b.build()
        if not has_cifar_stem(made):
            options: dict[str, Any] = {} if b.encoders == (3,) else {"in_chans": b.encoders[0]}
            vit = name.startswith("vit_")
            if vit or has_one_size(name) or getattr(made, "dynamic_img_size", False):
                options["img_size"] = b.size
            if vit:
                options |= vit_options(b.patch_size, b.num_heads)
            return name, options
        network = f"{b.arch} with CIFAR's stem, for images of {b.size} pixels,"
    raise ConfigError(f"{network} is no network of timm's; --format safetensors and onnx have it")


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Which network a command is about: ``RUN|FILE|--timm NAME``."""
    parser.add_argument("source", nargs="?", metavar="RUN|FILE", help="a run's folder, a checkpoint's, or an export")
    parser.add_argument("--timm", metavar="NAME", help="a timm model in its place; random weights without --pretrained")
    parser.add_argument("--pretrained", metavar="FILE", help="weights for --timm: timm's, lightly's or DINO's file")
    parser.add_argument("--which", choices=("teacher", "student"), help="of a run; default: the teacher, if any")
    parser.add_argument("--size", type=int, metavar="N", help="pixels of the images; default: the network's own")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and draws (default: 0)")


def open_backbone(given: argparse.Namespace) -> Backbone:
    """The network that :func:`add_source_flags` tells of. Raises ConfigError for what cannot be used."""
    if (given.source is None) == (given.timm is None):
        raise ConfigError("which network? give a run's folder, an exported file, or --timm NAME; one of them")
    if given.size is not None and given.size < 1:
        raise ConfigError(f"--size must be at least 1 pixel, got {given.size}")
    if not 0 <= given.seed < 2**63:
        raise ConfigError(f"--seed must be at least 0 and below 2**63, got {given.seed}")
    if given.timm is not None:
        if given.which is not None:
            raise ConfigError("--which is for runs; leave it out with --timm")
        pretrained = None if given.pretrained is None else Path(given.pretrained)
        return from_timm(given.timm, pretrained=pretrained, size=given.size, seed=given.seed)
    path = Path(given.source)
    if given.pretrained is not None:
        raise ConfigError("--pretrained goes with --timm NAME")
    if not path.exists():
        raise ConfigError(f"{path}: no such run or file; give a run's folder or an exported .safetensors")
    if path.is_dir():
        return from_run(path, given.which)
    if given.which is not None:
        raise ConfigError("--which is for runs; an exported file holds one network")
    return from_file(path)
