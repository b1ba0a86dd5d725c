"""Read weights from files, and load them into a network, whatever project wrote them. Nothing is unpickled."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ConfigError
from ..files import describe_load_error
from .layouts import Report, map_weights

_KEY = "fasttrain"
_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Files of a folder that transformers wrote, in order of preference."""
_SETTINGS = re.compile(
    r"GLOBAL ((?:argparse|classy_vision|collections|easydict|fvcore|hydra|(?:pytorch_)?lightning|mmengine|numpy"
    r"|omegaconf|pathlib|vissl|yacs)\.\S+)"
)
"""Classes of the settings that training programs store next to their weights."""
_MOST_CLASSES = 100
_PLAIN = (bool, bytes, complex, dict, float, frozenset, int, list, set, slice, str, tuple)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return the description of the network that ``fasttrain export`` wrote into a .safetensors file, or None."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        return None if text is None else dict(json.loads(text))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from None


def metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """Return the header of a .safetensors file, which :func:`read_metadata` reads."""
    return {"format": "pt", _KEY: json.dumps(about)}


def save_tensors(network: nn.Module, path: Path, header: Mapping[str, str]) -> None:
    """Write a network's tensors as .safetensors. A tensor with several names is stored under each of them."""
    stored: set[int] = set()
    tensors = {}
    for name, tensor in network.state_dict().items():
        whole = tensor.detach().cpu().contiguous()
        tensors[name] = whole.clone() if whole.data_ptr() in stored else whole
        stored.add(whole.data_ptr())
    save_file(tensors, path, metadata=dict(header))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return every tensor in a file of weights, with dots between the keys of nested dictionaries.

    Supported are .safetensors files, torch files, and folders that transformers wrote. Raise ConfigError for a missing
    or corrupt file, and for one with code in it.
    """
    tensors = dict(_flat(_load(path)))
    if not tensors:
        raise ConfigError(f"{path}: holds no weights. Give a state_dict, or a checkpoint that holds one.")
    return tensors


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> Report:
    """Load the tensors of a file into a network, and return the report of :func:`.layouts.map_weights`.

    Raise ConfigError, which names ``origin``, if a tensor of the network is missing, superfluous or of another shape.
    The network is unchanged then.
    """
    expected = network.state_dict()
    loaded, report = map_weights(tensors, network)
    for name in [n for n in expected if n.endswith("num_batches_tracked") and n not in loaded]:
        loaded[name] = expected[name]
    if not report.mapped:
        first = ", ".join(sorted(tensors)[:2])
        raise _foreign(origin, network, f"none of its names ({first}, ...) is the network's")
    if (depth := _depth(loaded)) != (own := _depth(expected)) and depth and own:
        raise _foreign(origin, network, f"it has {depth} blocks, not {own}")
    missing = [name for name in expected if name not in loaded]
    if missing:
        count = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise _foreign(origin, network, f"it has no {missing[0]!r}{count}")
    for name, tensor in expected.items():
        if loaded[name].shape != tensor.shape:
            raise _foreign(origin, network, f"{name!r} is {[*loaded[name].shape]}, not {[*tensor.shape]}")
    if left := sorted(loaded.keys() - expected.keys()):
        raise _foreign(origin, network, f"it has {left[0]!r}, which the network does not have")
    network.load_state_dict(loaded)
    return report


def _depth(names: Mapping[str, Tensor]) -> int:
    """Return the number of blocks of a ViT."""
    return max((int(m[1]) + 1 for name in names if (m := re.match(r"blocks\.(\d+)\.", name))), default=0)


class _Settings:
    """Replaces every object of a training program's settings. It keeps nothing, and its methods do nothing."""

    def __new__(cls, *arguments: Any) -> _Settings:
        return object.__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dictionary:
    """Replaces a dictionary of another class by a plain one with the same items."""

    def __new__(cls, *arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


def _load(path: Path) -> Any:
    if path.is_dir():
        path = next((path / name for name in _FOLDER if (path / name).is_file()), path)
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder without {', '.join(_FOLDER)}. Give a file, or export a run first.")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give a file of weights.")
    try:
        if path.suffix == ".json":
            shards = sorted({*json.loads(path.read_text())["weight_map"].values()})
            return {name: tensor for shard in shards for name, tensor in _load(path.parent / shard).items()}
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return _load_torch(path)
    except ConfigError:
        raise
    except Exception as error:  # torch raises any error for a corrupt file
        raise _unreadable(path, error) from None


def _load_torch(path: Path) -> Any:
    """Return the content of a torch file. Objects of a training program's settings are replaced by empty ones."""
    inert: list[Any] = [Namespace, *_PLAIN]
    while True:
        try:
            with torch.serialization.safe_globals(inert), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other versions of pickle
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            settings = _SETTINGS.search(str(error))
            if settings is None or len(inert) > _MOST_CLASSES:
                raise
            inert.append((_Dictionary if settings[1].lower().endswith("dict") else _Settings, settings[1]))


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{key}", value
            else:
                yield from _flat(value, f"{prefix}{key}.")


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: {describe_load_error(error)} Choose another file.")


def _foreign(origin: str, network: nn.Module, why: str) -> ConfigError:
    return ConfigError(
        f"{origin}: has the weights of another network than {type(network).__name__}: {why}. "
        "Choose the file's network, or another file."
    )
