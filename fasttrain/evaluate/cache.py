"""Features on disk, found again by what decides them: weights, images, view. A second evaluation extracts nothing."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from nvidia.dali import __version__ as dali_version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import pipelines
from ..distributed.world import World
from ..errors import ConfigError
from ..pipelines import Loader, Source, ViewRecipe
from .features import Features, extract_views

_SAMPLED = 16  # images whose content is part of the listing


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/fasttrain/features``, which is under ``~/.cache`` unless set."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fasttrain" / "features"


def network_digest(network: nn.Module) -> str:
    """Hash of a network's structure, of what its modules keep as plain numbers and names, and of every weight.

    A ViT's heads are such a number: the structure and the weights of three heads and of six are the same.
    """
    digest = hashlib.sha256(str(network).encode())
    for name, module in network.named_modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        digest.update(f"{name} {sorted(plain.items())}".encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def source_digest(source: Source) -> str:
    """Hash of a data set's listing: names, sizes and dates of its files, labels, and the content of a few images."""
    count = len(source)
    digest = hashlib.sha256(f"{count} {source.channels} {source.encoded}".encode())
    if source.labels is not None:
        digest.update(source.labels.tobytes())
    for i in range(count):
        with suppress(OSError):  # unreadable images are no part of the features
            digest.update(f"{i} {source.stamp(i)}".encode(errors="surrogateescape"))
    for i in range(0, count, max(1, count // _SAMPLED)):  # in case a date lies
        with suppress(OSError):
            digest.update(source.read(i).tobytes())
    return digest.hexdigest()


@cache
def views_digest() -> str:
    """Hash of the code that makes views, and the version of DALI, which decodes: another code makes other pixels."""
    folder = Path(pipelines.__file__).parent
    digest = hashlib.sha256(dali_version.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class FeatureCache:
    """Extracts features of one network, or finds them in ``folder`` (None: always extracts). Collective.

    Rank 0 alone reads and writes the files and decides; where it finds them the other ranks get nothing.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, world: World, folder: Path | None, *, batch: int, threads: int
    ) -> None:
        self._network, self._device, self._world = network.to(device), device, world
        self._folder, self._batch, self._threads = folder, batch, threads
        self.is_main = world.is_main
        self.digest = network_digest(network)
        """Hash of the network and its weights."""
        self._sources: dict[int, str] = {}
        self.extracted = 0
        """Images that the network has seen."""
        self.reused = 0
        """Images whose features were on disk."""

    def views(self, source: Source, recipe: ViewRecipe, seed: int = 0) -> Features | None:
        """Features [N, V, D] of the recipe's views of every readable image; None on ranks that are spared the work."""
        path = self._path(source, recipe, seed)
        features = self._read(path) if self._world.is_main else None
        if self._agree(features is not None):
            self.reused += len(source)
            return features
        loader = Loader(
            source,
            recipe,
            max(1, self._batch // recipe.n_views),
            seed=seed,
            rank=self._world.rank,
            world_size=self._world.size,
            device=self._device.type,
            threads=self._threads,
            shuffle=False,
            drop_last=False,
        )
        try:
            features = extract_views(self._network, loader, self._device)
        finally:
            loader.close()
        self.extracted += len(source)
        if self._world.is_main:
            self._write(path, features)
        return features

    def _path(self, source: Source, recipe: ViewRecipe, seed: int) -> Path | None:
        if self._folder is None:
            return None
        if id(source) not in self._sources:
            self._sources[id(source)] = source_digest(source)
        drawn = seed if any(not view.center for view in recipe.views) else 0
        parts = (self.digest, self._sources[id(source)], views_digest(), repr(recipe), drawn, self._device.type)
        return self._folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:40]}.safetensors"

    def _read(self, path: Path | None) -> Features | None:
        if path is None or not path.is_file():
            return None
        try:
            tensors: dict[str, Tensor] = load_file(path, device=str(self._device))
        except (OSError, SafetensorError):
            return None  # half a file is extracted again
        return Features(tensors["features"], tensors.get("labels"))

    def _write(self, path: Path | None, features: Features) -> None:
        if path is None:
            return
        tensors = {"features": features.features} | ({} if features.labels is None else {"labels": features.labels})
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"features cannot be kept in {path.parent}: {error}; choose --cache DIR") from None

    def _agree(self, found: bool) -> bool:
        """What rank 0 found, on every rank."""
        if self._world.size == 1:
            return found
        answer = [found]
        dist.broadcast_object_list(answer)
        return answer[0]
