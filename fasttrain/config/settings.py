"""The trainer's settings. Each field is a flag, a YAML key and a keyword of ``fasttrain.train``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..flags import Count, Fraction, JsonText, Natural, NonNegative, Paths, PathText, Positive, Seed, Sides, flag
from ..optim.optimizers import NAMES as OPTIMIZERS
from ..optim.schedules import LrScaling

IN_MEMORY = "in memory: "
"""Prefix stored as ``data_path`` for in-memory data, so that later commands do not open unrelated files."""

MODULE = "module: "
"""Prefix stored as ``arch`` for a backbone that Python passed as a module, which no command can build."""


@dataclass(frozen=True)
class TrainConfig:
    """The settings of the trainer. Names and defaults follow facebookresearch/dino where it has the setting."""

    arch: str = flag("vit_small", "network: conv_small|medium, vit_mini|tiny|small|base|large, or any timm model")
    patch_size: Count | None = flag(
        None, "patch size of a ViT in pixels; default: from the name, 16 for vit_small etc."
    )
    num_heads: Count | None = flag(None, "attention heads of a ViT; default: the architecture's")
    activation_checkpointing: bool = flag(False, "recompute blocks in backward: less memory, slower")
    drop_path_rate: Fraction = flag(0.1, "stochastic depth rate of the student")
    drop_path_subset: bool = flag(
        False, "stochastic depth at the same rate in all blocks, which compute only the samples that they keep"
    )

    optimizer: str = flag("adamw", "one of " + ", ".join(OPTIMIZERS))
    lr: NonNegative = flag(5e-4, "peak learning rate for a global batch of 256 images, see --lr_scaling")
    lr_scaling: LrScaling = flag(
        "linear", "linear: the rate is for 256 images; sqrt: for 1,024, and grows with the root of the batch"
    )
    min_lr: NonNegative = flag(1e-6, "learning rate at the end of the schedule")
    lr_drops: tuple[float, ...] = flag((), "epochs at which the learning rate is divided by 10; replaces the cosine")
    constant_lr: bool = flag(False, "keep the learning rate at its peak after the warm-up, as DINOv3 does")
    warmup_epochs: NonNegative = flag(10.0, "epochs of linear warm-up")
    weight_decay: NonNegative = flag(0.04, "weight decay at the start")
    weight_decay_end: NonNegative = flag(0.4, "weight decay at the end (cosine schedule)")
    decay_all: bool = flag(False, "apply weight decay to biases and norms too")
    layer_decay: Positive = flag(1.0, "factor of the backbone's learning rate per layer, from the output to the input")
    patch_embed_lr_mult: NonNegative = flag(1.0, "factor of the learning rate of a ViT's patch embedding")
    freeze_backbone_epochs: NonNegative = flag(0.0, "epochs in which only the heads learn")
    clip_grad: NonNegative = flag(3.0, "maximum norm of the whole gradient; 0: no clipping")
    clip_each: bool = flag(False, "clip the gradient of each parameter separately, as DINO does")
    epochs: Count = flag(100, "number of epochs")
    batch_size_per_gpu: Count = flag(64, "images per rank and micro-step")
    gradient_accumulation_steps: Count = flag(1, "micro-steps per optimizer step")

    data_path: Paths | None = flag(
        None, "folders or shards of images, or hf:PATH (docs/data.md); default: the embedded digits"
    )
    val_path: Paths | None = flag(None, "held-out images for k-NN, if data_path has no train/ and val/")
    data_weights: tuple[Positive, ...] = flag((), "share of each data path in an epoch; default: every image once")
    output_dir: PathText | None = flag(None, "folder of the run; default: runs/<method>[-er]-<time>")
    num_workers: Natural | None = flag(None, "threads that decode and augment; default: this rank's share of the cores")
    max_bad_fraction: Fraction = flag(0.1, "stop with exit status 2 if a larger fraction of the images is unreadable")

    zero_stage: Literal[0, 1, 2, 3] | None = flag(None, "ZeRO stage; default: the lowest that fits")
    overlap_comm: bool | None = flag(
        None, "reduce gradients during backward at ZeRO 1 to 3; default: without --offload_optimizer"
    )
    offload_optimizer: bool = flag(False, "keep the optimizer's state and step in host memory (ZeRO 1 to 3)")
    deepspeed_config: JsonText | None = flag(
        None, "JSON file with further settings of DeepSpeed's ZeRO; docs/scaling.md lists them"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "auto: bf16 on GPUs that support it, else fp32")
    seed: Seed = flag(0, "seed of weights, data order and views")
    deterministic: bool = flag(False, "use deterministic kernels only")

    init_from: PathText | None = flag(
        None, "start the backbone from weights of another project or an export; docs/export.md lists the layouts"
    )
    resume: PathText = flag(
        "auto", "auto (newest checkpoint in output_dir), never, or the folder of a run or a checkpoint"
    )
    reference_path: PathText | None = flag(
        None, "images not to be forgotten: k-NN, CKA to the start and RankMe on them, with every k-NN evaluation"
    )
    max_forgetting: NonNegative | None = flag(
        None, "stop with exit status 3 after N points less of k-NN accuracy on --reference_path, at its last checkpoint"
    )
    saveckp_freq: Count = flag(20, "keep the checkpoint of every N-th epoch")
    keep: Count | None = flag(None, "keep the newest N checkpoints instead; default: --saveckp_freq decides")
    saveckp_freq_steps: Natural = flag(0, "also save a checkpoint every N steps; 0: after each epoch only")
    limit_steps: Count | None = flag(None, "stop after N steps of the schedule")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "none"], ...] = flag(
        ("tensorboard",), "where the logged values go besides metrics.jsonl: tensorboard, wandb, mlflow, or none"
    )
    log_every: Count = flag(10, "steps between logged steps")
    max_skipped_steps: Count = flag(3, "stop with exit status 3 after N consecutive steps that are not finite")
    rollback: Natural = flag(0, "instead return to the last checkpoint, with another data order, up to N times")
    watchdog_minutes: NonNegative = flag(30.0, "end the run with exit status 1 if no step finishes in time; 0: never")
    stop_on_collapse: bool = flag(False, "stop with exit status 3 when the representation has collapsed")
    knn_every: Natural = flag(10, "epochs between k-NN evaluations; also at the start and end. 0: no k-NN at all")
    knn_train_images: Count = flag(20_000, "labelled training images for k-NN and RankMe during the run, at most")
    knn_val_images: Count = flag(5_000, "held-out images for k-NN during the run, at most")

    @property
    def in_memory(self) -> bool:
        """Whether the images came as a data set from Python and so have no path."""
        return isinstance(self.data_path, str) and self.data_path.startswith(IN_MEMORY)

    @property
    def data_paths(self) -> tuple[str, ...]:
        """The data paths: none, one or several."""
        return _several(self.data_path)

    @property
    def val_paths(self) -> tuple[str, ...]:
        """The paths of the held-out images."""
        return _several(self.val_path)


def _several(paths: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if paths is None else (paths,) if isinstance(paths, str) else paths


@dataclass(frozen=True)
class ViewFlags:
    """DINO's five view flags. They change a recipe's views and are not stored."""

    global_crops_size: Sides | None = flag(None, "side of a global view in pixels, or its HEIGHT WIDTH")
    global_crops_scale: tuple[float, float] | None = flag(None, "area of a global crop as a fraction: MIN MAX")
    local_crops_number: Natural | None = flag(None, "number of local views")
    local_crops_size: Sides | None = flag(None, "side of a local view in pixels, or its HEIGHT WIDTH")
    local_crops_scale: tuple[float, float] | None = flag(None, "area of a local crop as a fraction: MIN MAX")


@dataclass(frozen=True)
class PixelFlags:
    """The flags of the pixel format. They are fields of ``Pixels``, and the images decide the others."""

    channels: Count | None = flag(
        None, "channels of the images, 1 to 16; default: 3, or the images' own if they have more"
    )
    pixel_range: tuple[float, ...] | None = flag(
        None, "MIN MAX of values that are not 8-bit, for all channels or for each; default: measured and printed"
    )
