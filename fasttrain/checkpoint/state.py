"""What a checkpoint holds, by the names of parameters, and how it gets into an engine, cut as that one cuts.

DeepSpeed writes, fasttrain reads: DeepSpeed's own reader runs the code of a pickle, and takes back only what the same
number of ranks wrote at the same ZeRO stage; its universal checkpoints know Adam's moments alone. The files are mapped,
so a rank reads from the disk only the parts that it will hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.engine import Engine
from ..engine.shards import inner, shares

Parts = list[Tensor]
"""Flat tensors that make up, end to end, a parameter or its moment."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's tensors, still on the disk, and the few numbers beside them."""

    buffers: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    weights: Mapping[str, Parts]
    moments: Mapping[str, Mapping[str, Any]]
    """By trained parameter, then by the optimizer's name for it: Parts, or a number."""
    optimizer_step: int | None
    """Where an optimizer counts its steps by group (apex's LAMB)."""
    counters: Mapping[str, int]
    """DeepSpeed's own."""
    grad_scaler: Mapping[str, Any] | None
    """The dynamic loss scale of fp16."""

    def whole(self) -> dict[str, Tensor]:
        """Every buffer, weight and moment under its name, its parts joined, whoever wrote them."""
        found = dict(self.buffers) | {name: torch.cat(parts) for name, parts in self.weights.items()}
        for name, moments in self.moments.items():
            for key, value in moments.items():
                found[f"{name} {key}"] = torch.cat(value) if isinstance(value, list) else torch.as_tensor(value)
        return found


def client_state(engine: Engine) -> dict[str, Any]:
    """What DeepSpeed does not save by itself, for its ``save_checkpoint``."""
    from deepspeed.checkpoint.constants import (
        UNIVERSAL_CHECKPOINT_INFO,
        UNIVERSAL_CHECKPOINT_VERSION_KEY,
        UNIVERSAL_CHECKPOINT_VERSION_VALUE,
    )

    scaler = engine.deepspeed.torch_autocast_z0_gradscaler
    return {
        UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE},
        "trained": trained_names(engine),
        "grad_scaler": scaler.state_dict() if scaler else None,
    }


def trained_names(engine: Engine) -> list[str]:
    """The names of the trained parameters in the order in which the optimizer numbers them, or its shards hold them."""
    names = {parameter: name for name, parameter in engine.method.named_parameters()}
    return [names[share.parameter] for _, held in shares(engine.optimizer, engine.stage) for share in held]


def harmless() -> list[Any]:
    """The few classes that DeepSpeed itself writes into a checkpoint, allowed beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def read(folder: Path, stage: int, ranks: int, trained: Sequence[str]) -> Saved:
    """The checkpoint that ``ranks`` ranks wrote at ZeRO ``stage``. What holds more than tensors is refused unread.

    ``trained`` are the trained parameters' names in the optimizer's order, for a checkpoint of stage 0 that lacks them,
    as an earlier fasttrain's. Raises what ``torch.load`` raises, and KeyError for a file without its parts.
    """
    shards = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(ranks)]
    models = [_load(folder / f"{name}_model_states.pt") for name in (shards if stage == 3 else ["mp_rank_00"])]
    first = models[0]
    buffers = {name: first["module"][name] for name in first["buffer_names"]}
    whole = {name: tensor for name, tensor in first["module"].items() if name not in buffers}
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    for group in [*(first["param_shapes"] or []), first["frozen_param_shapes"] or {}]:
        shapes |= group  # under ZeRO-3 the tensors of "module" are empty
    weights = {} if stage == 3 else {name: [tensor.flatten()] for name, tensor in whole.items()}
    if stage == 0:
        optimizer = first["optimizer"]
        moments = _moments_of_whole(optimizer["state"], first.get("trained", trained))
    else:
        files = [_load(folder / f"{name}_optim_states.pt")["optimizer_state_dict"] for name in shards]
        sharded, moments = _sharded(first["param_shapes"], files, stage)
        weights |= sharded
        optimizer = files[0][_OPTIMIZER[stage]]
    if stage == 3:
        for name, shape in first["frozen_param_shapes"].items():
            fragments = [model["frozen_param_fragments"][name].flatten() for model in models]
            weights[name] = _taken(fragments, _by_parameter({name: math.prod(shape)}, fragments)[name])
    counters = {name: first[name] for name in ("global_steps", "global_samples", "skipped_steps")}
    step = optimizer["param_groups"][0].get("step")
    return Saved(buffers, shapes, weights, moments, step, counters, first.get("grad_scaler"))


Moments = dict[str, dict[str, Any]]

_OPTIMIZER = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}
_WEIGHTS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


def _moments_of_whole(states: Mapping[int, Mapping[str, Any]], names: Sequence[str]) -> Moments:
    return {
        name: {
            key: [value.flatten()] if _is_moment(key, value) else value for key, value in states.get(number, {}).items()
        }
        for number, name in enumerate(names)
    }


def _sharded(
    groups: Sequence[Mapping[str, torch.Size]], files: Sequence[Any], stage: int
) -> tuple[dict[str, Parts], Moments]:
    """Weights and moments from all ranks' shards of all groups."""
    weights: dict[str, Parts] = {}
    moments: Moments = {}
    for number, group in enumerate(groups):
        flats = [file[_WEIGHTS[stage]][number] for file in files]
        states = [file[_OPTIMIZER[stage]]["state"].get(number, {}) for file in files]
        sizes = {name: math.prod(shape) for name, shape in group.items()}
        for name, place in (_by_parameter if stage == 3 else _end_to_end)(sizes, flats).items():
            weights[name] = _taken(flats, place)
            moments[name] = {
                key: _taken([state[key] for state in states], place) if _is_moment(key, value) else value
                for key, value in states[0].items()
            }
    return weights, moments


def misfit(saved: Saved, engine: Engine) -> str | None:
    """Why a checkpoint does not fit the engine's network and method, or None."""
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in engine.method.named_parameters()}
    found, wanted = dict(saved.shapes), dict(shapes)
    found |= {name: tensor.shape for name, tensor in saved.buffers.items()}
    wanted |= {name: tensor.shape for name, tensor in _buffers(engine).items()}
    for name, shape in wanted.items():
        if name not in found:
            return f"it has no {name}"
        if tuple(found[name]) != tuple(shape):
            return f"size mismatch for {name}: {tuple(found[name])} in the checkpoint, {tuple(shape)} here"
    if unknown := found.keys() - wanted.keys():
        return f"it has {min(unknown)}, which this network has not"
    if other := set(trained_names(engine)) ^ saved.moments.keys():
        return f"{min(other)} is trained in one of the two only"
    return None


@torch.no_grad()
def place(saved: Saved, engine: Engine) -> None:
    """Copy a checkpoint that fits (:func:`misfit`) into the engine. Collective at stage 3."""
    zero, stage = engine.optimizer, engine.stage
    if stage == 3:
        zero.checkpoint_event_prologue()  # all parameters are cut, also the small ones that it keeps whole
    names = {parameter: name for name, parameter in engine.method.named_parameters()}
    optimizer = inner(zero)
    for flat, held in shares(zero, stage):
        state: dict[str, Any] = {} if saved.optimizer_step is None else {"step": saved.optimizer_step}
        for parameter, offset, piece in held:
            name = names[parameter]
            flat.data.view(-1).narrow(0, *piece).copy_(_narrow(saved.weights[name], offset, piece.numel))
            for key, value in saved.moments[name].items():
                if isinstance(value, list):
                    moment = state.setdefault(key, torch.zeros_like(flat.data, dtype=value[0].dtype))
                    moment.view(-1).narrow(0, *piece).copy_(_narrow(value, offset, piece.numel))
                elif value is not None:
                    state[key] = value.to(flat.device, copy=True) if isinstance(value, Tensor) else value
        optimizer.state[flat] = state
    for group in optimizer.param_groups:
        if saved.optimizer_step is not None:
            group["step"] = saved.optimizer_step
    for parameter, name in names.items():
        _place_weight(parameter, saved.weights[name], engine.world.rank)
    for name, buffer in _buffers(engine).items():
        buffer.copy_(saved.buffers[name])
    for name, count in saved.counters.items():
        setattr(engine.deepspeed, name, count)
    if saved.grad_scaler and (scaler := engine.deepspeed.torch_autocast_z0_gradscaler):
        scaler.load_state_dict(dict(saved.grad_scaler))
    if stage == 3:
        zero.checkpoint_event_epilogue()


def _place_weight(parameter: Any, parts: Parts, rank: int) -> None:
    """What the network computes with: the whole parameter, or this rank's ZeRO-3 part, whose end may be padding."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(_narrow(parts, 0, parameter.numel()).view_as(parameter))
        return
    part = parameter.ds_tensor.data
    offset = rank * part.numel()
    count = min(max(parameter.ds_numel - offset, 0), part.numel())
    part.view(-1).narrow(0, 0, count).copy_(_narrow(parts, offset, count))


def _buffers(engine: Engine) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds. All ranks have the same, so the first one's file is enough for all."""
    kept = engine.method.state_dict().keys()
    return {name: buffer for name, buffer in engine.method.named_buffers() if name in kept}


def _load(path: Path) -> Any:
    with torch.serialization.safe_globals(harmless()):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _is_moment(key: str, value: Any) -> bool:
    """Whether an optimizer's value has one element for each of the parameter's, and is not one number for all."""
    return isinstance(value, Tensor) and key != "step"


Places = dict[str, list[tuple[int, int]]]
"""By parameter: (start, numel) in the flat shard of every rank."""


def _end_to_end(sizes: Mapping[str, int], flats: Sequence[Tensor]) -> Places:
    """ZeRO-1 and 2: a group's parameters end to end, cut into one shard a rank without regard to where they end."""
    edges = [0]
    for flat in flats:
        edges.append(edges[-1] + flat.numel())
    places: Places = {}
    start = 0
    for name, numel in sizes.items():
        stop = start + numel
        overlaps = [(max(start, a), min(stop, b), a) for a, b in pairwise(edges)]
        places[name] = [(low - a, high - low) if high > low else (0, 0) for low, high, a in overlaps]
        start = stop
    return places


def _by_parameter(sizes: Mapping[str, int], flats: Sequence[Tensor]) -> Places:
    """ZeRO-3: each parameter cut into ceil(numel / ranks) elements a rank, the last ones padded; the parts in a row."""
    places: Places = {}
    start = 0
    for name, numel in sizes.items():
        part = -(-numel // len(flats))
        places[name] = [(start, min(max(numel - rank * part, 0), part)) for rank in range(len(flats))]
        start += part
    return places


def _taken(flats: Sequence[Tensor], place: Sequence[tuple[int, int]]) -> Parts:
    return [flat.narrow(0, *range_) for flat, range_ in zip(flats, place, strict=True)]


def _narrow(parts: Parts, start: int, numel: int) -> Tensor:
    """Elements ``start`` to ``start + numel`` of the concatenated parts; no other is read."""
    found = []
    for part in parts:
        low, high = max(start, 0), min(start + numel, part.numel())
        if high > low:
            found.append(part[low:high])
        start -= part.numel()
    return torch.cat(found) if found else parts[0][:0]
