"""A cache of features on disk, keyed by weights, images and view. A second evaluation extracts nothing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
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
from ..files import check_writable
from ..pipelines import Loader, Source, ViewRecipe
from .evaluator import ShowProgress
from .features import Features, extract_views

_SAMPLED = 16  # images whose content is part of the key


def default_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/fasttrain/features``, with ``~/.cache`` if the variable is not set."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fasttrain" / "features"


def network_digest(network: nn.Module) -> str:
    """Return a hash of a network: its structure, its modules' plain attributes, and every weight.

    The number of a ViT's heads is such an attribute. Structure and weights are the same with three heads and with six.
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
    """Return a hash of a data set: names, sizes and dates of its files, labels, and the content of a few images."""
    count = len(source)
    digest = hashlib.sha256(f"{count} {source.channels} {source.encoded}".encode())
    if source.labels is not None:
        digest.update(source.labels.tobytes())
    for i in range(count):
        with suppress(OSError):  # unreadable images have no features
            digest.update(f"{i} {source.stamp(i)}".encode(errors="surrogateescape"))
    for i in range(0, count, max(1, count // _SAMPLED)):  # in case a date is wrong
        with suppress(OSError):
            digest.update(source.read(i).tobytes())
    return digest.hexdigest()


@cache
def views_digest() -> str:
    """Return a hash of the code that makes views and of DALI's version. Both decide the pixels."""
    folder = Path(pipelines.__file__).parent
    digest = hashlib.sha256(dali_version.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class FeatureCache:
    """Features of one network, read from ``folder`` or extracted. Collective.

    Only rank 0 reads and writes the files. If it reads the features, the other ranks get None. Without a folder,
    features are always extracted.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        world: World,
        folder: Path | None,
        *,
        batch: int,
        threads: int,
        note: Callable[[str], None] = print,
        progress: ShowProgress | None = None,
    ) -> None:
        self._network, self._device, self._world = network.to(device), device, world
        self._batch, self._threads, self._note, self._progress = batch, threads, note, progress
        self._folder = self._writable(folder) if world.is_main else folder
        self.is_main = world.is_main
        self.digest = network_digest(network)
        """Hash of the network and its weights."""
        self._sources: dict[int, str] = {}
        self.extracted = 0
        """Images whose features were computed."""
        self.reused = 0
        """Images whose features were read."""

    def _writable(self, folder: Path | None) -> Path | None:
        """Return the folder, or None after a warning if no file can be written there."""
        if folder is None:
            return None
        try:
            check_writable(folder)
        except OSError as error:
            self._warn(folder, error)
            return None
        return folder

    def _warn(self, folder: Path, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        self._note(f"--cache {folder}: cannot be written: {reason}. Features are not cached.")

    def views(self, source: Source, recipe: ViewRecipe, seed: int = 0) -> Features | None:
        """Return features [N, V, D] of the recipe's V views of every readable image, or None (see the class)."""
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
            features = extract_views(self._network, loader, self._device, progress=self._shown(len(source)))
        finally:
            loader.close()
        self.extracted += len(source)
        if self._world.is_main:
            self._write(path, features)
        return features

    def _shown(self, total: int) -> Callable[[int], None] | None:
        progress = self._progress
        return None if progress is None else lambda done: progress("features", done, total)

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
            return None  # an incomplete file is replaced
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
            self._warn(path.parent, error)

    def _agree(self, is_cached: bool) -> bool:
        """Return rank 0's value on every rank."""
        if self._world.size == 1:
            return is_cached
        values = [is_cached]
        dist.broadcast_object_list(values)
        return values[0]
