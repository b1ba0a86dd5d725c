"""Build a method with its networks from a configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import methods
from ..config.resolve import Config
from ..errors import ConfigError
from ..methods import Method, Network, Task
from ..models.architectures import check_crops, checkpoint_activations, create_backbone, start_residuals_at_one
from ..models.batchnorm import has_batch_norm
from ..models.drop_path import drop_samples
from ..models.tokens import check_tokens


def build_method(config: Config, *, images: int, world_size: int, network: Network | None = None) -> Method:
    """Return the configured method with its networks. The caller seeds torch's generator.

    ``network`` builds the backbone instead of ``config.train.arch``. Raise ConfigError for a network, head or queue
    that the method cannot use.
    """
    t = config.train
    cls: Any = methods.load(config.method)
    sizes = [view.size for view in config.views.views]

    def backbone(channels: int) -> nn.Module:
        if network is None:
            made = create_backbone(
                t.arch,
                in_chans=channels,
                img_size=sizes[0],
                patch_size=t.patch_size,
                num_heads=t.num_heads,
                drop_path_rate=0.0 if t.drop_path_subset else t.drop_path_rate,
            )
            if not cls.zero_init_residual:
                start_residuals_at_one(made)
        else:
            made = network(channels)
        if cls.needs_patches:
            check_tokens(made)
        check_crops(made, sizes, channels)
        if t.drop_path_subset:
            drop_samples(made, t.drop_path_rate)
        if t.activation_checkpointing:
            checkpoint_activations(made)
        return made

    has_weights = t.init_from is not None or network is not None
    try:
        task = Task(config.entropy, config.views, images, t.batch_size_per_gpu * world_size, t.seed, has_weights)
        method: Method = cls(backbone, config.settings, task)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(getattr(method, "student", None), nn.Module):
        raise ConfigError(f"--method: {config.method} has no student. Set self.student in {cls.__name__}.__init__.")
    _check_batch(method, t.batch_size_per_gpu, world_size)
    return method


def _check_batch(method: Method, batch: int, world_size: int) -> None:
    """Raise ConfigError unless the batch can be divided and BatchNorm sees at least two images."""
    divisor = method.batch_divisor
    if batch % divisor:
        raise ConfigError(
            f"--batch_size_per_gpu: must be a multiple of {divisor}, the parts that BatchNorm sees separately "
            f"(--bn_splits), got {batch}."
        )
    rows = batch * world_size if method.synchronised_batch_norm else batch // divisor
    if rows == 1 and has_batch_norm(method):
        fewer = " or lower --bn_splits" if divisor > 1 else ""
        raise ConfigError(f"--batch_size_per_gpu: BatchNorm needs more than 1 image, got 1. Raise it{fewer}.")
