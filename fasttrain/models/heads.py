"""Projection heads and prototypes, shared by every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single

LastNorm = Literal["none", "batch", "scaled", "plain"]


def projection_mlp(
    dims: Sequence[int],
    *,
    batch_norm: bool = True,
    last_norm: LastNorm = "none",
    biases: bool = True,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Build Linear layers dims[0] -> dims[1] -> ... -> dims[-1] with BatchNorm and activation between them.

    ``last_norm`` follows the last layer: nothing, BatchNorm, BatchNorm without shift (SimCLR), or BatchNorm without
    shift and scale (SimSiam, MoCo v3). A layer before BatchNorm has no bias. Without ``biases`` no layer has one.
    """
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        normalised = last_norm != "none" if last else batch_norm
        layers.append(nn.Linear(width_in, width_out, bias=biases and not normalised))
        if normalised:
            norm = nn.BatchNorm1d(width_out, affine=not (last and last_norm == "plain"))
            if last and last_norm == "scaled":
                norm.bias.requires_grad_(False)
            layers.append(norm)
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


def trunc_normal_linears(module: nn.Module, std: float = 0.02) -> None:
    """Initialise every Linear as in DINO's head: truncated normal weights, zero bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Prototypes(nn.Module):
    """``count`` directions in R^dim. A call returns rows [count, dim] of unit norm, or of a learnt norm.

    The normalisation is in the forward pass, where ZeRO-3 has gathered the weight. A ``weight_norm`` hook would
    recompute a tensor that DeepSpeed does not know. So the norm of the weights themselves is free. It starts at
    ``start`` and determines how fast an optimizer turns the directions. (SwAV's official code resets it to 1 before
    every step.)
    """

    def __init__(self, dim: int, count: int, *, learn_norm: bool = False, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(start * F.normalize(torch.randn(count, dim), dim=1))
        self.norm = nn.Parameter(torch.ones(count, 1)) if learn_norm else None

    def forward(self) -> Tensor:
        """Return the prototypes [count, dim] for the losses."""
        rows = normalize_rows(at_least_single(self.weight))
        return rows if self.norm is None else rows * self.norm
