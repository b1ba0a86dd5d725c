"""Checks of a reduction's arguments. Each raises ValueError with one line that names the argument.

They check shapes, types and plain numbers only: reading a tensor's values would wait for the device. A NaN in a row
gives NaN in every result that depends on the row.
"""

from __future__ import annotations

import math

from torch import Tensor


def check_rows(x: Tensor, name: str, *, least_dim: int = 1, least_rows: int = 1) -> None:
    """Raise ValueError unless ``x`` is floating point [N, D] with N >= least_rows and D >= least_dim."""
    if x.ndim != 2 or x.shape[0] < least_rows or x.shape[1] < least_dim:
        raise ValueError(f"{name} must be [N, D] with N >= {least_rows} and D >= {least_dim}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def check_pair(
    x: Tensor,
    y: Tensor,
    x_name: str,
    y_name: str,
    *,
    least_dim: int = 1,
    least_rows: int = 1,
    same_rows: bool = False,
) -> None:
    """Raise ValueError unless x and y are rows of the same D, type and device, and with ``same_rows`` of the same N."""
    check_rows(x, x_name, least_dim=least_dim, least_rows=least_rows)
    if y is x:
        return
    check_rows(y, y_name, least_dim=least_dim, least_rows=least_rows)
    if x.shape[1] != y.shape[1] or (same_rows and x.shape[0] != y.shape[0]):
        size = "the same shape" if same_rows else "the same D"
        raise ValueError(f"{x_name} and {y_name} must have {size}, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"{x_name} and {y_name} must have one type and device, "
            f"got {x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )


def check_finite(value: float, name: str) -> None:
    """Raise ValueError if a number is infinite or NaN."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_positive(value: float | Tensor, name: str) -> None:
    """Raise ValueError unless a number is positive and finite. Of a tensor, only the number of elements is checked."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
    elif not value > 0 or math.isinf(value):
        raise ValueError(f"{name} must be positive and finite, got {value}")
