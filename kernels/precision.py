"""Floating-point precision that a reduction needs."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_single(x: Tensor) -> Tensor:
    """Return x in fp32 if it is half precision, otherwise unchanged.

    In half precision 1e-12 is 0 and a sum of squares overflows.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def accumulation_type(x: Tensor) -> torch.dtype:
    """Return fp64 for fp64, and fp32 for all other types."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def accumulable(x: Tensor) -> Tensor:
    """Return fp64 unchanged, and other types in fp32. Half-precision products are six times slower on most CPUs."""
    return x.to(accumulation_type(x))
