"""The knots of the integral over t, without t = 0, where every characteristic function is 1."""

from __future__ import annotations

import torch
from torch import Tensor


def knots_and_weights(knots: int, limit: float, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return t, exp(-t^2 / 2) and the weights at the knots 1 to ``knots - 1`` of [0, limit], each [knots - 1].

    The weights are the trapezoid rule's times exp(-t^2 / 2). They count t and -t, because the integrand is even.
    """
    step = limit / (knots - 1)
    t = torch.arange(1, knots, dtype=like.dtype, device=like.device) * step
    normal = (-t.square() / 2).exp()
    weights = 2 * step * normal
    weights[-1] /= 2
    return t, normal, weights
