"""BatchNorm over all ranks on the CPU.

It exists because torch.nn.SyncBatchNorm runs on GPUs only, and the tests compare ranks with one process on CPUs.
"""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..kernels.collectives import Group, mean_over_ranks
from ..kernels.precision import at_least_single


class RankBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all ranks: mean, then variance about it, each averaged over the group.

    Parameters and buffers have the names of ``nn.BatchNorm1d``, so checkpoints do not depend on the number of ranks.
    """

    group: Group | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` [B, C, ...] by the statistics of all ranks' rows, in at least fp32."""
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        wide = at_least_single(input)  # under autocast; the running statistics are fp32
        mean = mean_over_ranks(wide.mean(dims), self.group)
        centred = wide - mean.view(shape)
        variance = mean_over_ranks(centred.square().mean(dims), self.group)
        self._track(mean.detach(), variance.detach(), input.numel() // input.shape[1] * self.group_size())
        normalised = centred * (variance.view(shape) + self.eps).rsqrt()
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    def group_size(self) -> int:
        """Return the number of ranks that the statistics cover."""
        return 1 if self.group is None else torch.distributed.get_world_size(self.group)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), rate)


class RankBatchNormAct(RankBatchNorm):
    """RankBatchNorm with the activation that timm puts inside its BatchNorm layers."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, drop and activate, as ``timm.layers.BatchNormAct2d`` does."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def synchronise(module: nn.Module, group: Group) -> nn.Module:
    """Make every BatchNorm of ``module`` use the statistics of all ranks; parameters and their names stay the same."""
    if torch.cuda.is_available():
        converted: nn.Module = convert_sync_batchnorm(module, group)
        return converted
    return _convert(module, group)


def _convert(module: nn.Module, group: Group) -> nn.Module:
    if isinstance(module, _BatchNorm) and not isinstance(module, RankBatchNorm):
        cls = RankBatchNormAct if isinstance(module, BatchNormAct2d) else RankBatchNorm
        synced = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
        synced.load_state_dict(module.state_dict())
        synced.group = group
        synced.train(module.training)
        for own, new in zip(module.parameters(), synced.parameters(), strict=True):
            new.requires_grad_(own.requires_grad)
        for name, child in module.named_children():
            synced.add_module(name, child)
        return synced
    for name, child in module.named_children():
        module.add_module(name, _convert(child, group))
    return module


@torch.no_grad()
def broadcast_statistics(module: nn.Module, group: Group | None) -> None:
    """Copy rank 0's running statistics to all ranks, for methods whose BatchNorm sees each rank's batch alone."""
    if group is None:
        return
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    buffers = [x for layer in layers for x in (layer.running_mean, layer.running_var) if x is not None]
    if not buffers:
        return
    flat = torch.cat([x.flatten() for x in buffers])
    torch.distributed.broadcast(flat, group=group, group_src=0)
    for x, part in zip(buffers, torch.split(flat, [x.numel() for x in buffers]), strict=True):
        x.copy_(part.view_as(x))
