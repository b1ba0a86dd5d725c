"""From a configuration to a method with its networks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import methods
from ..config.settings import Config
from ..errors import ConfigError
from ..methods import Method
from ..methods.base import Task
from ..methods.bound import SphereSettings
from ..models.architectures import check_crops, checkpoint_activations, create_backbone, start_residuals_at_one

_FEW = 64  # images a batch below which the twin's entropy says little


def build_method(config: Config, *, images: int, world_size: int) -> Method:
    """The method with its networks, as the configuration says; the seed is the caller's.

    Raises ConfigError for a network, head or queue that the method cannot work with.
    """
    t = config.train
    kind: Any = methods.load(config.method)
    network = partial(
        _network,
        t.arch,
        [view.size for view in config.views.views],
        patch_size=t.patch_size,
        num_heads=t.num_heads,
        drop_path_rate=t.drop_path_rate,
        checkpointing=t.activation_checkpointing,
        zero_init_residual=kind.zero_init_residual,
    )
    task = Task(config.entropy, config.views, images, t.batch_size_per_gpu * world_size)
    try:
        method: Method = kind(network, config.settings, task)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_batch(method, config, world_size)
    return method


def _check_batch(method: Method, config: Config, world_size: int) -> None:
    """Enough images for BatchNorm, which may see a part of a rank's batch only, and for rows that need another."""
    here = config.train.batch_size_per_gpu
    splits = getattr(config.settings, "bn_splits", 1)
    if here % splits:
        raise ConfigError(f"--bn_splits {splits} does not divide the batch of {here} images a rank; choose a divisor")
    rows = here * world_size if method.synchronised_batch_norm else here // splits
    if rows == 1 and any(isinstance(m, _BatchNorm) for m in method.modules()):
        fewer = " or lower --bn_splits" if splits > 1 else ""
        raise ConfigError(f"BatchNorm needs more than one image a batch; raise --batch_size_per_gpu{fewer}")
    if here * world_size == 1 and getattr(config.settings, "entropy_leave_one_out", False):
        raise ConfigError("--entropy_leave_one_out needs more than one image a batch; raise --batch_size_per_gpu")


def _network(
    arch: str, sizes: list[int], in_chans: int, *, checkpointing: bool, zero_init_residual: bool, **options: Any
) -> nn.Module:
    network = create_backbone(arch, in_chans=in_chans, img_size=sizes[0], **options)
    if not zero_init_residual:
        start_residuals_at_one(network)
    check_crops(network, sizes, in_chans)
    if checkpointing:
        checkpoint_activations(network)
    return network


def doubts(config: Config, *, images: int, batch: int) -> list[str]:
    """What can be run but is probably not meant; ``batch`` images of all ranks see each other."""
    doubts = []
    if config.entropy and batch < _FEW and getattr(config.settings, "entropy_support", "batch") == "batch":
        if isinstance(config.settings, SphereSettings):
            most = f"a batch of {batch} tells entropies apart up to log {batch} = {math.log(batch):.2f} nats only"
        else:  # soft assignments have no such bound
            rows = batch * config.views.n_views
            most = f"{rows} assignments, once they are sharp, have at most log {rows} = {math.log(rows):.2f} nats"
        doubts.append(f"warning: {most}; a larger --batch_size_per_gpu makes the twin's entropy count")
    prototypes = getattr(config.settings, "nmb_prototypes", None)
    if prototypes is None and config.method == "dino":
        prototypes = config.settings.out_dim
    if prototypes is not None and prototypes > images:
        doubts.append(f"warning: {prototypes} prototypes are more than the {images} images; fewer make sense")
    return doubts
