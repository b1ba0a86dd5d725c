"""The one reader of checkpoints: tensors by parameter name, from any number of ranks and any ZeRO stage.

DeepSpeed writes and fasttrain reads. DeepSpeed's own reader unpickles, which can run code, and accepts only files of
the same number of ranks and the same ZeRO stage. Its universal checkpoints know only Adam's moments. A rank opens only
the files that it needs. They are mapped into memory, so it reads only the needed parts of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
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
from ..engine.zero_files import (
    ModelFile,
    OptimizerFile,
    contiguous_spans,
    model_files,
    optimizer_files,
    padded_spans,
    universal_info,
)
from ..errors import ConfigError
from ..files import describe_load_error
from .card import read_card, verify

if TYPE_CHECKING:
    from ..engine.engine import Engine


@dataclass(frozen=True)
class Part:
    """Some elements of a parameter or moment, in a file that is opened when they are read."""

    numel: int
    read: Callable[[], Tensor]
    """Return the elements as a flat tensor, mapped from the disk."""


Parts = Sequence[Part]
"""The parts of a parameter or of one of its moments, in order."""
Moments = dict[str, dict[str, Any]]
"""By trained parameter, then by the optimizer's name for the value: Parts, or a number."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint's tensors, mapped from the disk, and its numbers."""

    buffers: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    parameters: Mapping[str, Parts]
    """The weights that the network computes with, in as few files as possible."""
    weights: Mapping[str, Parts]
    """The weights that the optimizer steps."""
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
                chosen[name] = _joined(parts).view(self.shapes[name])
        return {name.removeprefix(prefix): tensor for name, tensor in chosen.items()}

    def whole(self) -> dict[str, Tensor]:
        """Return every buffer, weight and moment by name, with the parts of weights and moments joined."""
        tensors = dict(self.buffers) | {name: _joined(parts) for name, parts in self.weights.items()}
        for name, moments in self.moments.items():
            for key, value in moments.items():
                tensors[f"{name} {key}"] = _joined(value) if isinstance(value, list) else torch.as_tensor(value)
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
    models = model_files(stage, ranks)

    @cache
    def model_of(rank: int) -> ModelFile:
        return ModelFile.load(folder / models[rank])

    @cache
    def optimizer_of(rank: int) -> OptimizerFile:
        return OptimizerFile.load(folder / optimizer_files(stage, ranks)[rank], stage)

    def frozen_part(name: str, rank: int) -> Tensor:
        return model_of(rank).frozen_parts[name].flatten()

    model = model_of(0)
    shapes = {name: tensor.shape for name, tensor in model.parameters.items()}
    for group in [*model.trained_shapes, model.frozen_shapes]:
        shapes |= group  # the tensors of the model file are empty at stage 3
    weights: dict[str, Parts] = {}
    if stage < 3:
        weights = {name: [_whole(tensor)] for name, tensor in model.parameters.items()}
    parameters = dict(weights)
    values: Moments = {}
    optimizer: Mapping[str, Any] = {}
    if stage == 0 and moments:
        optimizer = model.optimizer
        values = _moments_of_parameters(optimizer["state"], model.client.get("trained", trained))
    if stage == 3 or (stage and moments):
        optimizer = optimizer_of(0).optimizer
        sharded, values = _sharded(model.trained_shapes, optimizer_of, ranks, stage)
        weights |= sharded
    if stage == 3:
        for name, shape in model.frozen_shapes.items():
            cut = padded_spans({name: math.prod(shape)}, ranks)[name]
            weights[name] = _cut(partial(frozen_part, name), cut)
    for name, stored in model.shared.items():
        shapes[name], weights[name] = shapes[stored], weights[stored]
    step = optimizer["param_groups"][0].get("step") if moments else None
    scaler = model.client.get("grad_scaler")
    return Saved(model.buffers, shapes, weights | parameters, weights, values, step, model.counters, scaler)


def _moments_of_parameters(states: Mapping[int, Mapping[str, Any]], names: Sequence[str]) -> Moments:
    return {
        name: {
            key: [_whole(value)] if _is_moment(key, value) else value for key, value in states.get(number, {}).items()
        }
        for number, name in enumerate(names)
    }


def _sharded(
    groups: Sequence[Mapping[str, torch.Size]], file_of: Callable[[int], OptimizerFile], ranks: int, stage: int
) -> tuple[dict[str, Parts], Moments]:
    """Return weights and moments from all ranks' shards of all groups. Only the first rank's file is opened."""
    weights: dict[str, Parts] = {}
    moments: Moments = {}
    first = file_of(0)

    def weight(number: int, rank: int) -> Tensor:
        return file_of(rank).weights[number]

    def moment(number: int, key: str, rank: int) -> Tensor:
        tensor: Tensor = file_of(rank).optimizer["state"][number][key]
        return tensor

    for number, group in enumerate(groups):
        sizes = {name: math.prod(shape) for name, shape in group.items()}
        shard = first.weights[number].numel()
        cuts = padded_spans(sizes, ranks) if stage == 3 else contiguous_spans(sizes, shard, ranks)
        for name, cut in cuts.items():
            weights[name] = _cut(partial(weight, number), cut)
            moments[name] = {
                key: _cut(partial(moment, number, key), cut) if _is_moment(key, value) else value
                for key, value in first.optimizer["state"].get(number, {}).items()
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
                        elements = _narrow(value, offset, piece.numel)
                        moment = state.setdefault(key, torch.zeros_like(flat.data, dtype=elements.dtype))
                        moment.view(-1).narrow(0, *piece).copy_(elements)
                    elif value is not None:
                        state[key] = value.to(flat.device, copy=True) if isinstance(value, Tensor) else value
            optimizer.state[flat] = state
        if saved.optimizer_step is not None:
            for group in optimizer.param_groups:
                group["step"] = saved.optimizer_step
        for parameter, name in names.items():
            _place_weight(parameter, _whole_weights(saved, engine)[name], saved.weights[name], engine.world.rank)
        for name, buffer in _buffers(engine).items():
            buffer.copy_(saved.buffers[name])
        set_counters(engine.deepspeed, saved.counters)
        if saved.grad_scaler and (scaler := gradient_scaler(engine.deepspeed)):
            scaler.load_state_dict(dict(saved.grad_scaler))


def _place_weight(parameter: Any, whole: Parts, stepped: Parts, rank: int) -> None:
    """Copy into the network's whole parameter, or into this rank's ZeRO-3 shard, whose end may be padding."""
    shard = local_shard(parameter)
    if shard is None:
        parameter.data.copy_(_narrow(whole, 0, parameter.numel()).view_as(parameter))
        return
    offset, count = _shard_span(parameter, shard, rank)
    shard.data.view(-1).narrow(0, 0, count).copy_(_narrow(stepped, offset, count))


def _whole_weights(saved: Saved, engine: Engine) -> Mapping[str, Parts]:
    """Return the weights that fill whole parameters. At stage 0 the optimizer steps these parameters themselves."""
    return saved.weights if engine.stage == 0 else saved.parameters


def _shard_span(parameter: Any, shard: Tensor, rank: int) -> tuple[int, int]:
    """Return the first element of a rank's ZeRO-3 shard and the number of elements without padding."""
    offset = rank * shard.numel()
    return offset, min(max(full_numel(parameter) - offset, 0), shard.numel())


def open_files(saved: Saved, engine: Engine) -> None:
    """Open every file that :func:`place` reads on this rank, so that a damaged one is found before anything changes.

    Raises any error of ``torch.load``, and KeyError if a file lacks a key.
    """
    names = {parameter: name for name, parameter in engine.method.named_parameters()}
    for _, pieces in stepped_tensors(engine.optimizer, engine.stage):
        for parameter, offset, piece in pieces:
            name = names[parameter]
            moments = [value for value in saved.moments[name].values() if isinstance(value, list)]
            for parts in (saved.weights[name], *moments):
                deque(_overlaps(parts, offset, piece.numel), maxlen=0)
    for parameter, name in names.items():
        shard = local_shard(parameter)
        if shard is None:
            deque(_overlaps(_whole_weights(saved, engine)[name], 0, parameter.numel()), maxlen=0)
        else:
            deque(_overlaps(saved.weights[name], *_shard_span(parameter, shard, engine.world.rank)), maxlen=0)


def _buffers(engine: Engine) -> dict[str, Tensor]:
    """Return the buffers that a checkpoint holds. All ranks have the same, so the first rank's file serves all."""
    persistent = engine.method.state_dict().keys()
    return {name: buffer for name, buffer in engine.method.named_buffers() if name in persistent}


def _is_moment(key: str, value: Any) -> bool:
    """Return whether an optimizer's value has one element per element of the parameter."""
    return isinstance(value, Tensor) and key != "step"


def _whole(tensor: Tensor) -> Part:
    return Part(tensor.numel(), tensor.flatten)


def _cut(flat_of: Callable[[int], Tensor], span: Sequence[tuple[int, int]]) -> list[Part]:
    """Return the parts (start, elements) of every rank's flat tensor."""

    def read(rank: int, start: int, numel: int) -> Tensor:
        return flat_of(rank).narrow(0, start, numel)

    return [Part(numel, partial(read, rank, start, numel)) for rank, (start, numel) in enumerate(span)]


def _joined(parts: Parts) -> Tensor:
    """Return all elements. Parts without elements are not read, except where all are."""
    tensors = [part.read() for part in parts if part.numel] or [parts[0].read()]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _overlaps(parts: Parts, start: int, numel: int) -> Iterator[Tensor]:
    """Yield the tensors that make up elements ``start`` to ``start + numel``."""
    for part in parts:
        low, high = max(start, 0), min(start + numel, part.numel)
        if high > low:
            yield part.read()[low:high]
        start -= part.numel


def _narrow(parts: Parts, start: int, numel: int) -> Tensor:
    """Return elements ``start`` to ``start + numel``. No other element is read."""
    slices = [*_overlaps(parts, start, numel)]
    return torch.cat(slices) if slices else parts[0].read()[:0]
