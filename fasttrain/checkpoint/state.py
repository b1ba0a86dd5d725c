"""The one reader of checkpoints: tensors by parameter name, from any number of ranks and any ZeRO stage.

DeepSpeed writes and fasttrain reads. DeepSpeed's own reader unpickles, which can run code, and accepts only files of
the same number of ranks and the same ZeRO stage. Its universal checkpoints know only Adam's moments. The files are
mapped into memory, so a rank reads from the disk only the parts that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.zero import (
    full_numel,
    full_shape,
    gradient_scaler,
    inner_optimizer,
    local_shard,
    set_counters,
    stepped_tensors,
    weights_writable,
)
from ..engine.zero_files import ModelFile, OptimizerFile, model_files, optimizer_files, spans, universal_info
from ..errors import ConfigError
from ..files import describe_load_error
from .card import read_card, verify

if TYPE_CHECKING:
    from ..engine.engine import Engine

Parts = list[Tensor]
"""Flat tensors whose concatenation is a parameter or one of its moments."""
Moments = dict[str, dict[str, Any]]
"""By trained parameter, then by the optimizer's name for the value: Parts, or a number."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's tensors, mapped from the disk, and its numbers."""

    buffers: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    weights: Mapping[str, Parts]
    moments: Mapping[str, Mapping[str, Any]]
    optimizer_step: int | None
    """The step count of an optimizer that counts per group (apex's LAMB)."""
    counters: Mapping[str, int]
    """DeepSpeed's own counters."""
    grad_scaler: Mapping[str, Any] | None
    """The dynamic loss scale of fp16."""

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the whole buffers and weights whose names start with ``prefix``, without the prefix."""
        chosen = {name: buffer for name, buffer in self.buffers.items() if name.startswith(prefix)}
        for name, parts in self.weights.items():
            if name.startswith(prefix):
                flat = parts[0] if len(parts) == 1 else torch.cat(parts)
                chosen[name] = flat.view(self.shapes[name])
        return {name.removeprefix(prefix): tensor for name, tensor in chosen.items()}

    def whole(self) -> dict[str, Tensor]:
        """Return every buffer, weight and moment by name, with the parts of weights and moments joined."""
        tensors = dict(self.buffers) | {name: torch.cat(parts) for name, parts in self.weights.items()}
        for name, moments in self.moments.items():
            for key, value in moments.items():
                tensors[f"{name} {key}"] = torch.cat(value) if isinstance(value, list) else torch.as_tensor(value)
        return tensors


def client_state(engine: Engine) -> dict[str, Any]:
    """Return the state that DeepSpeed does not save by itself, for its ``save_checkpoint``."""
    scaler = gradient_scaler(engine.deepspeed)
    own = {"trained": trained_names(engine), "grad_scaler": scaler.state_dict() if scaler else None}
    return universal_info() | own


def trained_names(engine: Engine) -> list[str]:
    """Return the names of the trained parameters in the order of the optimizer or its shards."""
    names = {parameter: name for name, parameter in engine.method.named_parameters()}
    return [names[piece.parameter] for _, pieces in stepped_tensors(engine.optimizer, engine.stage) for piece in pieces]


def whole_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the method's buffers and fp32 weights whose names start with ``prefix``, without the prefix.

    The files with the weights are verified; others need not exist. Raises ConfigError for a checkpoint that is
    incomplete, damaged, or holds more than tensors and plain values.
    """
    card = read_card(folder)
    stage, ranks = card.zero_stage, card.world_size
    for name in model_files(stage, ranks) + (optimizer_files(stage, ranks) if stage == 3 else []):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: the checkpoint has no {name}. Choose another.")
        verify(folder / name)
    try:
        return read(folder, stage, ranks, moments=False).tensors(prefix)
    except Exception as error:  # torch and the damaged content raise many kinds
        raise ConfigError(f"{folder}: {describe_load_error(error)} Choose another checkpoint.") from None


def read(folder: Path, stage: int, ranks: int, trained: Sequence[str] = (), *, moments: bool = True) -> Saved:
    """Return the checkpoint that ``ranks`` ranks wrote at ZeRO ``stage``. A file with more than tensors is refused.

    ``trained`` names the trained parameters in the optimizer's order. It serves checkpoints of stage 0 that earlier
    versions wrote without the names. Without ``moments``, the optimizer's files are read only where they hold the
    weights, which is at stage 3. Raises any error of ``torch.load``, and KeyError if a file lacks a key.
    """
    models = [ModelFile.load(folder / name) for name in model_files(stage, ranks)]
    model = models[0]
    shapes = {name: tensor.shape for name, tensor in model.parameters.items()}
    for group in [*model.trained_shapes, model.frozen_shapes]:
        shapes |= group  # the tensors of the model file are empty at stage 3
    weights: dict[str, Parts] = {}
    if stage < 3:
        weights = {name: [tensor.flatten()] for name, tensor in model.parameters.items()}
    values: Moments = {}
    optimizer: Mapping[str, Any] = {}
    if stage == 0 and moments:
        optimizer = model.optimizer
        values = _moments_of_parameters(optimizer["state"], model.client.get("trained", trained))
    if stage == 3 or (stage and moments):
        files = [OptimizerFile.load(folder / name, stage) for name in optimizer_files(stage, ranks)]
        optimizer = files[0].optimizer
        sharded, values = _sharded(model.trained_shapes, files, stage)
        weights |= sharded
    if stage == 3:
        for name, shape in model.frozen_shapes.items():
            parts = [file.frozen_parts[name].flatten() for file in models]
            weights[name] = _cut(parts, spans({name: math.prod(shape)}, parts, stage)[name])
    for name, stored in model.shared.items():
        shapes[name], weights[name] = shapes[stored], weights[stored]
    step = optimizer["param_groups"][0].get("step") if moments else None
    return Saved(model.buffers, shapes, weights, values, step, model.counters, model.client.get("grad_scaler"))


def _moments_of_parameters(states: Mapping[int, Mapping[str, Any]], names: Sequence[str]) -> Moments:
    return {
        name: {
            key: [value.flatten()] if _is_moment(key, value) else value for key, value in states.get(number, {}).items()
        }
        for number, name in enumerate(names)
    }


def _sharded(
    groups: Sequence[Mapping[str, torch.Size]], files: Sequence[OptimizerFile], stage: int
) -> tuple[dict[str, Parts], Moments]:
    """Return weights and moments from all ranks' shards of all groups."""
    weights: dict[str, Parts] = {}
    moments: Moments = {}
    for number, group in enumerate(groups):
        flats = [file.weights[number] for file in files]
        states = [file.optimizer["state"].get(number, {}) for file in files]
        sizes = {name: math.prod(shape) for name, shape in group.items()}
        for name, span in spans(sizes, flats, stage).items():
            weights[name] = _cut(flats, span)
            moments[name] = {
                key: _cut([state[key] for state in states], span) if _is_moment(key, value) else value
                for key, value in states[0].items()
            }
    return weights, moments


def misfit(saved: Saved, engine: Engine) -> str | None:
    """Return why a checkpoint does not fit the engine's network and method, or None."""
    expected = {name: full_shape(p) for name, p in engine.method.named_parameters(remove_duplicate=False)}
    expected |= {name: buffer.shape for name, buffer in _buffers(engine).items()}
    shapes = dict(saved.shapes) | {name: buffer.shape for name, buffer in saved.buffers.items()}
    for name, shape in expected.items():
        if name not in shapes:
            return f"it has no {name}"
        if tuple(shapes[name]) != tuple(shape):
            return f"size mismatch for {name}: {tuple(shapes[name])} in the checkpoint, {tuple(shape)} here"
    if unknown := shapes.keys() - expected.keys():
        return f"it has {min(unknown)}, which this network does not have"
    if other := set(trained_names(engine)) ^ saved.moments.keys():
        return f"{min(other)} is trained only here or only there"
    return None


@torch.no_grad()
def place(saved: Saved, engine: Engine) -> None:
    """Copy a checkpoint without :func:`misfit` into the engine. Collective at stage 3."""
    names = {parameter: name for name, parameter in engine.method.named_parameters()}
    optimizer = inner_optimizer(engine.optimizer)
    with weights_writable(engine.optimizer, engine.stage):
        for flat, pieces in stepped_tensors(engine.optimizer, engine.stage):
            state: dict[str, Any] = {} if saved.optimizer_step is None else {"step": saved.optimizer_step}
            for parameter, offset, piece in pieces:
                name = names[parameter]
                flat.data.view(-1).narrow(0, *piece).copy_(_narrow(saved.weights[name], offset, piece.numel))
                for key, value in saved.moments[name].items():
                    if isinstance(value, list):
                        moment = state.setdefault(key, torch.zeros_like(flat.data, dtype=value[0].dtype))
                        moment.view(-1).narrow(0, *piece).copy_(_narrow(value, offset, piece.numel))
                    elif value is not None:
                        state[key] = value.to(flat.device, copy=True) if isinstance(value, Tensor) else value
            optimizer.state[flat] = state
        if saved.optimizer_step is not None:
            for group in optimizer.param_groups:
                group["step"] = saved.optimizer_step
        for parameter, name in names.items():
            _place_weight(parameter, saved.weights[name], engine.world.rank)
        for name, buffer in _buffers(engine).items():
            buffer.copy_(saved.buffers[name])
        set_counters(engine.deepspeed, saved.counters)
        if saved.grad_scaler and (scaler := gradient_scaler(engine.deepspeed)):
            scaler.load_state_dict(dict(saved.grad_scaler))


def _place_weight(parameter: Any, parts: Parts, rank: int) -> None:
    """Copy into the network's whole parameter, or into this rank's ZeRO-3 shard, whose end may be padding."""
    shard = local_shard(parameter)
    if shard is None:
        parameter.data.copy_(_narrow(parts, 0, parameter.numel()).view_as(parameter))
        return
    offset = rank * shard.numel()
    count = min(max(full_numel(parameter) - offset, 0), shard.numel())
    shard.data.view(-1).narrow(0, 0, count).copy_(_narrow(parts, offset, count))


def _buffers(engine: Engine) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint holds. All ranks have the same, so the first rank's file serves all."""
    persistent = engine.method.state_dict().keys()
    return {name: buffer for name, buffer in engine.method.named_buffers() if name in persistent}


def _is_moment(key: str, value: Any) -> bool:
    """Return whether an optimizer's value has one element per element of the parameter."""
    return isinstance(value, Tensor) and key != "step"


def _cut(flats: Sequence[Tensor], span: Sequence[tuple[int, int]]) -> Parts:
    return [flat.narrow(0, start, numel) for flat, (start, numel) in zip(flats, span, strict=True)]


def _narrow(parts: Parts, start: int, numel: int) -> Tensor:
    """Return elements ``start`` to ``start + numel`` of the concatenated parts. No other element is read."""
    slices = []
    for part in parts:
        low, high = max(start, 0), min(start + numel, part.numel())
        if high > low:
            slices.append(part[low:high])
        start -= part.numel()
    return torch.cat(slices) if slices else parts[0][:0]
