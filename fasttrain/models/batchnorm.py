"""BatchNorm over all ranks on the CPU.

It exists because torch.nn.SyncBatchNorm runs on GPUs only, and the tests compare ranks with one process on CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from ..kernels.collectives import Group, all_reduce_mean, start_gather
from ..kernels.precision import at_least_single


def has_batch_norm(network: nn.Module) -> bool:
    """Return whether a network has a BatchNorm of any kind."""
    return any(isinstance(layer, _BatchNorm) for layer in network.modules())


class RankBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all ranks, with one message per layer forward and one backward.

    Parameters and buffers have the names of ``nn.BatchNorm1d``, so checkpoints do not depend on the number of ranks.
    """

    group: Group | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` [B, C, ...] by the statistics of all ranks' rows, in at least fp32.

        All ranks must have equal batches.
        """
        if not self.training:
            return super().forward(input)
        wide = at_least_single(input)  # under autocast; the running statistics are fp32
        mean, variance = _statistics(wide.detach(), self.group)
        self._track(mean, variance, _rows(input) * self.group_size())
        normalised: Tensor = _Normalise.apply(wide, self.weight, self.bias, mean, variance, self.eps, self.group)
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
        self.running_mean.lerp_(mean.to(self.running_mean), rate)
        self.running_var.lerp_((variance * (count / max(count - 1, 1))).to(self.running_var), rate)


@torch.no_grad()
def _statistics(x: Tensor, group: Group | None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [C] of x [B, C, ...] over all ranks, from one message.

    The variance of equal parts is the mean of their variances plus the variance of their means.
    """
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    if group is None:
        return mean, variance
    means, variances = start_gather(torch.stack([mean, variance])[None], group)().unbind(1)
    between, mean = torch.var_mean(means, 0, correction=0)
    return mean, variances.mean(0) + between


class _Normalise(torch.autograd.Function):
    """``weight (x - mean) / sqrt(variance + eps) + bias``, where mean and variance are functions of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        group: Group | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.group = eps, group
        return batch_norm(x, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        # With mean and variance as constants. The second and third are the sums of g xhat and g over this rank's rows.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [of_x, True, True]
        )
        if of_x:  # mean and variance move with x: subtract the parts of g along 1 and along xhat
            means = all_reduce_mean(torch.stack([dweight, dbias]), ctx.group) / -_rows(x)
            means *= (variance + ctx.eps).rsqrt() if weight is None else (variance + ctx.eps).rsqrt() * weight
            dx += batch_norm(x, mean, variance, means[0], means[1], eps=ctx.eps)
        return dx if of_x else None, dweight if of_weight else None, dbias if of_bias else None, *[None] * 4


def _rows(x: Tensor) -> int:
    """Return the number of values per channel of x [B, C, ...]."""
    return x.numel() // x.shape[1]


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
