"""The weights of a checkpoint, whole, whichever ZeRO stage wrote it; read as tensors only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .state import harmless
from .store import Card, read_card, unloadable, verify


def newest(run: Path) -> Path:
    """The newest complete checkpoint of a run's folder, or ``run`` itself where it is a checkpoint.

    Raises ConfigError where there is none, as in a run that was stopped before its first.
    """
    if (run / "fasttrain.json").is_file():
        return run
    folder = run / "checkpoints"
    found = sorted(path for path in folder.glob("step-*") if (path / "fasttrain.json").is_file())
    if not found:
        hint = "let it train on (--saveckp_freq_steps N publishes one every N steps)"
        raise ConfigError(f"{run} has no complete checkpoint; {hint}, or choose another run")
    latest = folder / "latest"
    named = folder / latest.read_text(errors="replace").strip() if latest.is_file() else found[-1]
    return named if named in found else found[-1]


def whole_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of the method whose name starts with ``prefix``, without it, in fp32 as it was trained.

    Stages 0 to 2 keep parameters whole. Stage 3 cuts each, flattened, into one part a rank of ceil(elements / ranks)
    elements, the last of them padded: those of trained parameters lie end to end in the optimizer's fp32 shards, those
    of a teacher beside the model's buffers (the layout that ``deepspeed.utils.zero_to_fp32`` undoes). Raises
    ConfigError for a checkpoint that is incomplete, damaged, or holds more than tensors and plain values.
    """
    card = read_card(folder)
    try:
        tensors = _whole(folder) if card.zero_stage < 3 else _joined(folder, card, prefix)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"checkpoint {folder} is damaged (no {error}); choose another") from None
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _whole(folder: Path) -> dict[str, Tensor]:
    module: dict[str, Tensor] = _read(folder / "mp_rank_00_model_states.pt")["module"]
    return module


def _joined(folder: Path, card: Card, prefix: str) -> dict[str, Tensor]:
    """Join the parts of the ranks' files."""
    names = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(card.world_size)]
    models = [_read(folder / f"{name}_model_states.pt") for name in names]
    first = models[0]
    tensors: dict[str, Tensor] = {name: first["module"][name] for name in first["buffer_names"]}
    for name, shape in (first["frozen_param_shapes"] or {}).items():
        if name.startswith(prefix):
            tensors[name] = _join([model["frozen_param_fragments"][name] for model in models], shape)
    shards = [_flat(folder / f"{name}_optim_states.pt") for name in names]
    start = 0
    for name, shape in ((name, shape) for group in first["param_shapes"] for name, shape in group.items()):
        part = math.ceil(math.prod(shape) / card.world_size)
        if name.startswith(prefix):
            tensors[name] = _join([shard[start : start + part] for shard in shards], shape)
        start += part
    for name, same in first["shared_params"].items():
        if same in tensors:
            tensors[name] = tensors[same]
    return tensors


def _flat(path: Path) -> Tensor:
    """A rank's parts of all trained parameters, end to end."""
    return torch.cat(_read(path)["optimizer_state_dict"]["fp32_flat_groups"])


def _join(parts: list[Tensor], shape: torch.Size) -> Tensor:
    return torch.cat([part.flatten() for part in parts])[: math.prod(shape)].view(shape)


def _read(path: Path) -> Any:
    """What one of DeepSpeed's files holds; it is mapped, so what nobody looks at (moments) is never read."""
    if not path.is_file():
        raise ConfigError(f"checkpoint {path.parent} is incomplete: {path.name} is missing; choose another")
    verify(path)
    try:
        with torch.serialization.safe_globals(harmless()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the damage leads to
        raise ConfigError(f"checkpoint {path.parent} {unloadable(error)}") from None
