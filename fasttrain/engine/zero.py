"""DeepSpeed's configuration, its private names and the patches that fasttrain applies to it.

fasttrain needs attributes that DeepSpeed does not document: the flat shards, their layouts and the averaged gradients.
Only this module, ``zero_files.py`` and ``distributed/deepspeed_names.py`` use such names. ``tests/engine/test_zero.py``
has a test per name, so an upgrade of DeepSpeed that moves a name fails with that name. Importing this module does not
import DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..config.settings import TrainConfig
from ..distributed.deepspeed_names import full_numel as full_numel
from ..distributed.deepspeed_names import full_shape as full_shape
from ..distributed.deepspeed_names import local_shard as local_shard
from ..distributed.world import World
from ..errors import ConfigError
from ..optim.layerwise import Layout, Piece

TESTED = "0.19.8"
"""The version of DeepSpeed whose private names these are."""

# Bytes of model state per parameter: on every rank, and shared by the ranks. The state is the fp32 weight, gradient,
# two Adam moments and teacher. Stages 1 and 2 have the weights twice: the optimizer holds a shard of a copy.
_STATE_BYTES = {0: (20, 0), 1: (12, 12), 2: (8, 16), 3: (0, 20)}
_BUCKET = 500_000_000  # most elements that are reduced at once: DeepSpeed's default


def quiet_deepspeed() -> None:
    """Make DeepSpeed log errors only, and hide torch's warnings about functions that DeepSpeed calls."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def least_stage(train: TrainConfig) -> int:
    """Return the lowest ZeRO stage that supports the settings."""
    return 1 if train.offload_optimizer or train.overlap_comm else 0


def stage_for(train: TrainConfig, parameters: int, world: World, device: torch.device) -> int:
    """Return ``--zero_stage``, or the lowest stage whose model state takes at most half of the rank's memory.

    ``parameters`` counts the elements of all parameters. Raises ConfigError for fp16 at stages 1 to 3.
    """
    stage: int
    least = least_stage(train)
    if train.zero_stage is not None:
        stage = train.zero_stage
    elif world.size == 1:
        stage = least
    else:
        memory = _memory(device) / (1 if device.type == "cuda" else world.local_size)
        needs = {s: parameters * (whole + sharded / world.size) for s, (whole, sharded) in _STATE_BYTES.items()}
        stage = next((s for s, need in needs.items() if s >= least and need <= memory / 2), 3)
    if stage and train.precision == "fp16":
        # DeepSpeed 0.19.8 clips the scaled gradient to --clip_grad and removes the scale afterwards. The result is
        # 65536 times too short.
        raise ConfigError(
            f"--precision: fp16 works at --zero_stage 0 only, got --zero_stage {stage}, where DeepSpeed clips "
            "gradients before it unscales them. Use --precision bf16 or --zero_stage 0."
        )
    return stage


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return int(psutil.virtual_memory().total)


_OVERLAY = {
    **dict.fromkeys(
        ("allgather_bucket_size", "allgather_partitions", "use_multi_rank_bucket_allreduce"),
        (1, 2),
    ),
    **dict.fromkeys(("contiguous_gradients", "reduce_bucket_size", "reduce_scatter"), (1, 2, 3)),
    **dict.fromkeys(
        (
            "stage3_allgather_sequential",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_module_granularity_threshold",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "stage3_use_all_reduce_for_fetch_params",
        ),
        (3,),
    ),
}
"""Fields of ``zero_optimization`` that ``--deepspeed_config`` may set, and the stages at which they have an effect.

hpZ (``zero_hpz_partition_size``) is missing: with DeepSpeed 0.19.8, two ranks reach another loss after one step.
"""
_OWNED = {
    "bf16": "precision",
    "fp16": "precision",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "clip_grad",
    "optimizer": "optimizer",
    "scheduler": "lr",
    "torch_autocast": "precision",
    "train_batch_size": "batch_size_per_gpu",
    "train_micro_batch_size_per_gpu": "batch_size_per_gpu",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "zero_optimization.overlap_comm": "overlap_comm",
    "zero_optimization.stage": "zero_stage",
}
"""Settings of DeepSpeed that have a flag."""


def overlay(text: str | None, stage: int) -> dict[str, Any]:
    """Return the fields of ``zero_optimization`` in the JSON of ``--deepspeed_config``.

    Raise ConfigError for a setting that has a flag, that DeepSpeed does not know or would ignore at this stage, that
    changes what a checkpoint or the guard relies on, or that has an invalid value.
    """
    if text is None:
        return {}
    content = json.loads(text)
    zero = content.pop("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"--deepspeed_config: zero_optimization must be an object, got {zero!r}. Write it in braces.")
    for name in [*content, *(f"zero_optimization.{field}" for field in zero)]:
        field = name.removeprefix("zero_optimization.")
        if name in _OWNED:
            raise ConfigError(f"--deepspeed_config: {name} has a flag of its own. Use --{_OWNED[name]}.")
        if field == name or field not in _OVERLAY:
            known = [f"zero_optimization.{other}" for other in _OVERLAY]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            hint = f"Did you mean {close[0]}?" if close else "Leave it out. docs/scaling.md lists what is supported."
            raise ConfigError(f"--deepspeed_config: {name} is unknown or not supported. {hint}")
        if stage not in _OVERLAY[field]:
            stages = " or ".join(map(str, _OVERLAY[field]))
            raise ConfigError(f"--deepspeed_config: {name} has an effect at --zero_stage {stages} only, got {stage}.")
    return zero


def _check_values(zero: Mapping[str, Any], text: str | None) -> None:
    """Raise ConfigError for a value of ``--deepspeed_config`` that DeepSpeed does not accept."""
    if text is None:
        return
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        reason = " ".join(str(error).split("\n")[1:3])
        raise ConfigError(f"--deepspeed_config: zero_optimization.{' '.join(reason.split())}") from None


def deepspeed_config(train: TrainConfig, stage: int, precision: str, trained: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a network with ``trained`` elements that the optimizer moves.

    Weights, gradients and averages are fp32 at every precision. Autocast lowers only the products.
    """
    overlap = overlaps(train, stage)
    # DeepSpeed allocates whole buckets, 2 GB of fp32 even for the smallest network, and reduces a bucket when it is
    # full. One bucket for all gradients would leave no backward pass to overlap with.
    bucket = min(_BUCKET, max(trained // 8, 1) if overlap else trained)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "overlap_comm": overlap}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    zero |= overlay(train.deepspeed_config, stage)
    _check_values(zero, train.deepspeed_config)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.batch_size_per_gpu,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": 0.0 if train.clip_each or clips_itself(train, stage) else train.clip_grad,
        "steps_per_print": 2**31 - 1,
        "zero_optimization": zero,
        # torch's fused AdamW and SGD work on flat shards as on tensors. LARS and LAMB know their shards' layouts.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        config["torch_autocast"] = {"enabled": True, "dtype": {"bf16": "bfloat16", "fp16": "float16"}[precision]}
    return config


def clips_itself(train: TrainConfig, stage: int) -> bool:
    """Return whether the engine clips the whole gradient instead of DeepSpeed.

    At stage 0 DeepSpeed computes the norm again, in a Python loop over all parameters and with a message.
    """
    return stage == 0 and train.clip_grad > 0 and not train.clip_each


def overlaps(train: TrainConfig, stage: int) -> bool:
    """Return whether DeepSpeed reduces gradients during the backward pass. At stage 0 the engine always does."""
    if train.overlap_comm is None:
        return stage == 3 or (stage > 0 and not train.offload_optimizer)
    return train.overlap_comm


def completed_config(train: TrainConfig, stage: int, precision: str, trained: int) -> Any:
    """Return the ZeRO part of :func:`deepspeed_config` with DeepSpeed's defaults for all other fields."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**deepspeed_config(train, stage, precision, trained)["zero_optimization"])


def autocast_modules() -> frozenset[type]:
    """Return the modules whose parameters and gradients DeepSpeed sends in the autocast precision at stages 1 to 3."""
    from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES

    return frozenset(LOWER_PRECISION_SAFE_MODULES)


def wrap(method: Any, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> tuple[Any, Any]:
    """Return DeepSpeed's engine around a method and DeepSpeed's optimizer around an optimizer.

    At stage 0 DeepSpeed does not reduce gradients: it would do so after the backward pass, on copies of all of them.
    """
    import deepspeed

    engine, wrapped, _, _ = deepspeed.initialize(model=method, optimizer=optimizer, config=config)
    if config["zero_optimization"]["stage"] == 0:
        _private(engine, "enable_backward_allreduce")
        engine.enable_backward_allreduce = False
    return engine, wrapped


def linear_function() -> Callable[..., Tensor]:
    """Return the function that ``torch.nn.functional.linear`` is now. DeepSpeed replaces it at stage 3 permanently."""
    function: Callable[..., Tensor] = vars(functional)["linear"]
    return function


def set_linear_function(function: Callable[..., Any]) -> None:
    """Make ``torch.nn.functional.linear`` this function."""
    vars(functional)["linear"] = function


def gradient_scaler(engine: Any) -> torch.amp.GradScaler | None:
    """Return the dynamic loss scaler of fp16, or None at other precisions."""
    scaler: torch.amp.GradScaler | None = _private(engine, "torch_autocast_z0_gradscaler")
    return scaler


def set_counters(engine: Any, counts: Mapping[str, int]) -> None:
    """Set DeepSpeed's own counters of steps and samples, by their names in a checkpoint."""
    for name, count in counts.items():
        _private(engine, name)
        setattr(engine, name, count)


def save_state(engine: Any, stage: int, path: Path, client_state: Mapping[str, Any], files: dict[str, Any]) -> None:
    """Put the content of every file of this rank's checkpoint into ``files``, by name. Nothing is written. Collective.

    The content refers to the live tensors.
    """

    def keep(content: Any, path: str) -> None:
        if stage == 2 and "module" in content:
            content = _with_frozen(content, engine.module)
        files[Path(path).name] = content

    with writer_replaced(engine, keep):
        engine.save_checkpoint(
            str(path.parent),
            tag=path.name,
            client_state=dict(client_state),
            save_latest=False,
            exclude_frozen_parameters=stage == 2,
        )


def _with_frozen(content: Mapping[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """Return a stage-2 model file's content with the parameters that are not trained, each stored once.

    DeepSpeed puts copies of them next to the module's own. On a GPU these copies are a second teacher in the file.
    """
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    tied = module.named_parameters(remove_duplicate=False)
    return {
        **content,
        "module": {**content["module"], **{name: p.detach() for name, p in tied if not p.requires_grad}},
        "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
        "frozen_param_fragments": frozen,
    }


@contextmanager
def writer_replaced(engine: Any, save: Callable[[Any, str], None]) -> Iterator[None]:
    """Within the context, ``engine.save_checkpoint`` passes every file to ``save(content, path)`` and makes no folder.

    DeepSpeed then does not copy its scripts zero_to_fp32.py and zero_to_torch.py into the checkpoint. The same scripts
    can be run as ``python -m deepspeed.utils.zero_to_fp32``.
    """
    writer = _private(engine, "checkpoint_engine")
    _private(writer, "save")
    _private(writer, "makedirs")
    _private(engine, "_copy_recovery_script")

    def write(state_dict: Any, path: str) -> None:  # DeepSpeed passes the arguments by these names
        save(_without_enums(state_dict), path)

    writer.save, writer.makedirs, engine._copy_recovery_script = write, lambda *_, **__: None, lambda _: None
    try:
        yield
    finally:
        del writer.save, writer.makedirs, engine._copy_recovery_script


def _without_enums(content: Any) -> Any:
    """Replace members of enums in nested dicts by their values.

    Python before 3.11.4 pickles a member as a call of ``getattr``, which ``torch.load(weights_only=True)`` refuses.
    """
    if type(content) is dict:
        return {name: _without_enums(value) for name, value in content.items()}
    return content.value if isinstance(content, Enum) else content


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside DeepSpeed's optimizer. At stage 0 they are the same object."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


_OPTIMIZER_NAMES = {
    1: "averaged_gradients bit16_groups cpu_offload dp_process_group single_partition_of_fp32_groups",
    3: "averaged_gradients checkpoint_event_epilogue checkpoint_event_prologue dp_process_group fp16_groups "
    "fp16_partitioned_groups_flat fp32_partitioned_groups_flat offload_optimizer sub_group_to_group_id",
}
"""Private names of DeepSpeed's optimizers, at stages 1 and 2 and at stage 3. Some are first used hours later."""


def check_names(optimizer: Any, stage: int) -> None:
    """Raise ConfigError, with the first missing name, unless DeepSpeed's optimizer has all names of this module."""
    for name in _OPTIMIZER_NAMES[3 if stage == 3 else 1].split():
        _private(optimizer, name)


class ParameterPiece(NamedTuple):
    """A rank's part of a parameter: its elements from ``offset`` are ``piece`` of a flat tensor."""

    parameter: Any
    offset: int
    piece: Piece


def stepped_tensors(optimizer: Any, stage: int) -> list[tuple[Tensor, list[ParameterPiece]]]:
    """Return every tensor that the inner optimizer steps, with the parameters' parts in it.

    At stage 0 these are the parameters themselves, at higher stages this rank's flat shards.
    """
    if stage == 0:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return [(p, [ParameterPiece(p, 0, Piece(0, p.numel()))]) for p in parameters]
    flats = _flat_shards(optimizer, stage)
    if stage < 3:
        groups = _private(optimizer, "bit16_groups")
        return [(flat, [_mapped_piece(p) for p in group]) for flat, group in zip(flats, groups, strict=True)]
    rank = process_group(optimizer).rank()
    tensors = []
    for flat, group in zip(flats, _private(optimizer, "fp16_groups"), strict=True):
        parts = [int(_private(p, "partition_numel")()) for p in group]
        pieces = padded_layout([(full_numel(p), part) for p, part in zip(group, parts, strict=True)], rank)
        members = zip(group, parts, pieces, strict=True)
        tensors.append((flat, [ParameterPiece(p, rank * part, piece) for p, part, piece in members]))
    return tensors


def is_copied(flat: Tensor, part: ParameterPiece, stage: int) -> bool:
    """Return whether a flat tensor's piece has the values of its parameter's part, as before the first step."""
    parameter, offset, piece = part
    shard = local_shard(parameter) if stage == 3 else None
    values = parameter.data.view(-1)[offset:] if shard is None else shard.data.view(-1)
    return torch.equal(flat.data.view(-1).narrow(0, *piece).to(values.device), values[: piece.numel].to(flat.dtype))


def padded_layout(sizes: Sequence[tuple[int, int]], rank: int) -> Layout:
    """Return a rank's ZeRO-3 layout from each parameter's elements and its elements per rank.

    A shard is the concatenation of this rank's parts of all parameters. The last ranks' parts end in padding.
    """
    pieces, start = [], 0
    for numel, part in sizes:
        pieces.append(Piece(start, min(max(numel - rank * part, 0), part)))
        start += part
    return pieces


def process_group(optimizer: Any) -> Any:
    """Return the group of the ranks that share the parameters, at stages 1 to 3."""
    return _private(optimizer, "dp_process_group")


def share_weights(optimizer: Any, stage: int) -> None:
    """Make stage 3 step the rank's shards of the weights themselves, not copies of them. All are fp32.

    DeepSpeed 0.19.8 intends to, but compares a torch.device with a device's name, and so copies. Offloaded shards are
    in another memory and have to be copies.
    """
    if stage < 3:
        return
    weights = _private(optimizer, "fp16_partitioned_groups_flat")
    for weight, stepped in zip(weights, _flat_shards(optimizer, stage), strict=True):
        if (weight.dtype, weight.device) == (stepped.dtype, stepped.device) and not _offloaded(optimizer, stage):
            stepped.data = weight.data


def group_gradients(optimizer: Any, stage: int) -> list[list[Tensor]]:
    """Return this rank's part of each parameter group's averaged gradient, between backward and DeepSpeed's step.

    At stage 0 every rank has the whole gradient. Above, the parts of all ranks are the whole, and padding is 0.
    """
    groups = optimizer.param_groups
    if stage == 0:
        return [[p.grad for p in group["params"] if p.grad is not None] for group in groups]
    gradients: list[list[Tensor]] = [[] for _ in groups]
    for number, parts in _gradients_by_shard(optimizer, stage).items():
        group = _private(optimizer, "sub_group_to_group_id")[number] if stage == 3 else number
        gradients[group] += [part for part in parts if part is not None]
    return gradients


def _gradients_by_shard(optimizer: Any, stage: int) -> dict[int, list[Tensor | None]]:
    """Return the averaged gradients of DeepSpeed's next step by the number of their flat shard.

    DeepSpeed gives them to its inner optimizer at the step. It copies an offloaded optimizer's gradients into host
    memory at once.
    """
    if _offloaded(optimizer, stage):
        return {number: [flat.grad] for number, flat in enumerate(_flat_shards(optimizer, stage))}
    gradients: dict[int, list[Tensor | None]] = _private(optimizer, "averaged_gradients")
    return gradients


@contextmanager
def update_skipped(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the context, DeepSpeed's step counts and clears gradients as usual, but moves no weight."""
    optimizer.step = lambda *_, **__: None  # type: ignore[assignment]
    try:
        yield
    finally:
        del optimizer.step


@contextmanager
def weights_writable(optimizer: Any, stage: int) -> Iterator[None]:
    """Within the context, every stage-3 parameter is sharded, also the small ones that ZeRO keeps whole. Collective."""
    if stage == 3:
        _private(optimizer, "checkpoint_event_prologue")()
    yield
    if stage == 3:
        _private(optimizer, "checkpoint_event_epilogue")()


def _flat_shards(optimizer: Any, stage: int) -> list[Tensor]:
    """Return this rank's flat fp32 shards, which the inner optimizer steps, at stages 1 to 3."""
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    shards: list[Tensor] = _private(optimizer, name)
    return shards


def _offloaded(optimizer: Any, stage: int) -> bool:
    return bool(_private(optimizer, "offload_optimizer" if stage == 3 else "cpu_offload"))


def _mapped_piece(parameter: Any) -> ParameterPiece:
    """Return a rank's piece under ZeRO-1 and 2, which cut a group's parameters, end to end, into one shard per rank.

    DeepSpeed notes the piece's place on the parameter if the rank has a piece.
    """
    mapping = _private(parameter, "_hp_mapping")
    if not mapping:
        return ParameterPiece(parameter, 0, Piece(0, 0))
    address = _private(mapping, "get_hp_fragment_address")()
    offset = _private(mapping, "lp_fragment_address").start
    return ParameterPiece(parameter, offset, Piece(address.start, address.numel))


def _private(owner: Any, name: str) -> Any:
    """Return an undocumented attribute of a DeepSpeed object. Raise ConfigError if this version does not have it."""
    try:
        return getattr(owner, name)
    except AttributeError:
        raise ConfigError(
            f"deepspeed {version('deepspeed')}: {type(owner).__name__} has no {name}. Install deepspeed=={TESTED}."
        ) from None
