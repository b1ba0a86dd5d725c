"""The tiles that ship: measured or, until a GPU has been met, compiled without spills (bench/aot.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Rows, columns and features a program works on at once, and how."""

    block_m: int
    block_n: int
    block_d: int
    block_out: int
    warps: int
    stages: int


def forward_tile(dim: int, dtype: torch.dtype, *, columns: bool = False) -> Tile:
    """For the sums of exponentials; ``columns``: sums over the columns too, which take registers.

    Rows of up to 256 features (fp32, whose products take three passes: 64) stay on the chip, longer ones pass by in
    parts of ``block_d``.
    """
    if dtype == torch.float32:
        return Tile(128, 64, *_features(dim, resident=64, part=32), 8, 2)
    block_d, _ = _features(dim, resident=256, part=128 if columns else 64)
    if block_d == 256:
        return Tile(64 if columns else 128, 64, block_d, block_d, 8, 3)
    return Tile(128, 64 if columns else 128, block_d, block_d, 8, 2 if columns and dim > 256 else 3)


def backward_tile(dim: int, dtype: torch.dtype) -> Tile:
    """For the gradient of the rows, which accumulates in registers: 256 features of it at a time (fp32: 128)."""
    if dtype == torch.float32:
        return Tile(64, 32, *_features(dim, resident=64, part=32, out=128), 4, 2)
    block_d, block_out = _features(dim, resident=256, part=64, out=256)
    return Tile(64 if block_out == 256 else 128, 64, block_d, block_out, 8, 2)


def attention_tile(dim: int, dtype: torch.dtype) -> Tile:
    """For attention, which keeps a running maximum beside what it accumulates: as the gradient, with fewer rows."""
    return replace(backward_tile(dim, dtype), block_m=64)


def _features(dim: int, *, resident: int, part: int, out: int = 16) -> tuple[int, int]:
    """Features of a row read at once, and of the gradient written at once: all, as ``tl.dot`` wants them, or a part."""
    padded = max(16, 1 << (dim - 1).bit_length())
    return (padded, padded) if padded <= resident else (part, min(out, padded))
