"""Floating-point precision that a reduction needs."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_single(x: Tensor) -> Tensor:
    """Return x in fp32 if it is half precision, otherwise unchanged.

    In half precision 1e-12 is 0 and a sum of squares overflows.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
