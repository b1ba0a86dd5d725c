"""The files that DeepSpeed writes into a checkpoint: their names, their keys and the layout of their shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import load_tensors

Spans = dict[str, list[tuple[int, int]]]
"""By parameter: (start, elements) of its part in the flat shard of every rank."""


def pickled_classes() -> list[Any]:
    """Return the few classes that DeepSpeed itself pickles into a checkpoint. They are safe to load."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def universal_info() -> dict[str, Any]:
    """Return the client state by which DeepSpeed's universal converter recognises a checkpoint."""
    from deepspeed.checkpoint.constants import (
        UNIVERSAL_CHECKPOINT_INFO,
        UNIVERSAL_CHECKPOINT_VERSION_KEY,
        UNIVERSAL_CHECKPOINT_VERSION_VALUE,
    )

    return {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}}


def model_files(stage: int, ranks: int) -> list[str]:
    """Return the names of the files with the weights. Stage 3 has one per rank, other stages have one."""
    parts = [f"zero_pp_rank_{rank}_" for rank in range(ranks)] if stage == 3 else [""]
    return [f"{part}mp_rank_00_model_states.pt" for part in parts]


def optimizer_files(stage: int, ranks: int) -> list[str]:
    """Return the names of the files with the optimizer's shards. Stage 0 has none."""
    return [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)] if stage else []


@dataclass(frozen=True)
class ModelFile:
    """The content of one of :func:`model_files`."""

    buffers: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    """Whole parameters. At stage 3 they are empty."""
    trained_shapes: Sequence[Mapping[str, torch.Size]]
    """One mapping per parameter group, at stages 1 to 3."""
    frozen_shapes: Mapping[str, torch.Size]
    frozen_parts: Mapping[str, Tensor]
    """This rank's flat part of every parameter that is not trained, at stages 2 and 3."""
    shared: Mapping[str, str]
    """Names of tied parameters, and the name under which each is stored, at stages 1 to 3."""
    optimizer: Any
    """The optimizer's state_dict at stage 0."""
    counters: Mapping[str, int]
    client: Mapping[str, Any]
    """The whole file, with the keys that the writer added."""

    @classmethod
    def load(cls, path: Path) -> ModelFile:
        """Map a file into memory. Raises KeyError if a key is missing, and any error of ``torch.load``."""
        states = load_tensors(path, pickled_classes())
        buffers = {name: states["module"][name] for name in states["buffer_names"]}
        return cls(
            buffers=buffers,
            parameters={name: tensor for name, tensor in states["module"].items() if name not in buffers},
            trained_shapes=states["param_shapes"] or [],
            frozen_shapes=states["frozen_param_shapes"] or {},
            frozen_parts=states["frozen_param_fragments"] or {},
            shared=states["shared_params"] or {},
            optimizer=states["optimizer"],
            counters={name: states[name] for name in ("global_steps", "global_samples", "skipped_steps")},
            client=states,
        )


@dataclass(frozen=True)
class OptimizerFile:
    """The content of one of :func:`optimizer_files`."""

    weights: Sequence[Tensor]
    """One flat fp32 shard per parameter group."""
    optimizer: Mapping[str, Any]
    """The inner optimizer's state_dict, whose parameters are the flat shards."""

    @classmethod
    def load(cls, path: Path, stage: int) -> OptimizerFile:
        """Map a file into memory. Raises KeyError if a key is missing, and any error of ``torch.load``."""
        states = load_tensors(path, pickled_classes())["optimizer_state_dict"]
        if stage == 3:
            return cls(states["fp32_flat_groups"], states["optimizer_state_dict"])
        return cls(states["single_partition_of_fp32_groups"], states["base_optimizer_state"])


def contiguous_spans(sizes: Mapping[str, int], shard: int, ranks: int) -> Spans:
    """ZeRO-1 and 2: a group's parameters end to end, cut into ``shard`` elements per rank.

    Return where the parameters of these sizes lie in all ranks' flat shards. The last shards may be shorter or empty.
    """
    total = sum(sizes.values())
    edges = [min(rank * shard, total) for rank in range(ranks)] + [total]
    result: Spans = {}
    start = 0
    for name, numel in sizes.items():
        stop = start + numel
        overlaps = [(max(start, a), min(stop, b), a) for a, b in pairwise(edges)]
        result[name] = [(low - a, high - low) if high > low else (0, 0) for low, high, a in overlaps]
        start = stop
    return result


def padded_spans(sizes: Mapping[str, int], ranks: int) -> Spans:
    """ZeRO-3: each parameter cut into ceil(elements / ranks) elements per rank, the last ones padded, end to end."""
    result: Spans = {}
    start = 0
    for name, numel in sizes.items():
        part = -(-numel // ranks)
        result[name] = [(start, min(max(numel - rank * part, 0), part)) for rank in range(ranks)]
        start += part
    return result
