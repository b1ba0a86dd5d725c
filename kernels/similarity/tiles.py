"""The tile shapes of the Triton kernels.

The Hopper tiles for half precision are measured (python -m bench.gpu). In bf16 all tiles compile without spills.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """Rows, columns and features per program, and its warps and stages."""

    block_m: int
    block_n: int
    block_d: int
    block_out: int
    warps: int
    stages: int


Sizes = dict[int, tuple[int, int, int, int]]
"""Rows, columns, warps and stages in half precision, by the features that stay on the chip. Key 0: longer rows."""


@dataclass(frozen=True)
class _Chip:
    rows: Sizes
    columns: Sizes
    backward: Sizes
    prototypes: Sizes


_PROTOTYPES: Sizes = {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2), 0: (64, 64, 8, 2)}
# By the major number of the compute capability; 0 is for chips that were not measured. The best tile of one chip may
# not fit another.
_CHIPS = {
    0: _Chip(
        rows={64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 3), 0: (128, 128, 8, 3)},
        columns={64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 3), 0: (128, 64, 8, 2)},
        backward={64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2), 0: (64, 64, 8, 2)},
        prototypes=_PROTOTYPES,
    ),
    9: _Chip(
        rows={64: (256, 64, 8, 3), 128: (128, 64, 4, 3), 256: (256, 64, 8, 3), 0: (256, 128, 8, 3)},
        columns={64: (128, 64, 4, 3), 128: (128, 64, 4, 3), 256: (256, 64, 8, 3), 0: (128, 128, 8, 3)},
        backward={64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 3), 0: (64, 64, 8, 3)},
        prototypes=_PROTOTYPES,
    ),
}
# The larger tile spills on an A100 where the positive is part of the gradient.
_CHIPS[8] = replace(_CHIPS[0], backward=_CHIPS[0].backward | {128: (128, 32, 8, 2)})
# A block has 99 KB of shared memory: RTX 30, 40 and 50, A10, L4, L40S. Others have at least 163 KB.
_SMALL = replace(
    _CHIPS[0],
    rows=_CHIPS[0].rows | {256: (128, 64, 8, 2)},
    backward=_CHIPS[0].backward | {128: (128, 32, 8, 2)},
    prototypes={64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2), 0: (64, 32, 8, 2)},
)
_SMALL_CAPABILITIES = (86, 89, 120, 121)


def forward_tile(dim: int, dtype: torch.dtype, capability: int = 0, *, columns: bool = False) -> Tile:
    """Return the tile for the sums of exponentials. ``columns``: sum over columns too, which needs registers.

    Rows of up to 256 features stay on the chip, and longer rows are read in parts of 64. In fp32, where products take
    three passes, the limit is 64. ``capability`` is the GPU's compute capability, for example 90, or 0.
    """
    if dtype == torch.float32:
        return Tile(128, 64, *_features(dim, resident=64, part=32), 8, 2)
    chip = _chip(capability)
    return _half(chip.columns if columns else chip.rows, dim)


def backward_tile(dim: int, dtype: torch.dtype, capability: int = 0) -> Tile:
    """Return the tile for the gradient of rows. It accumulates in registers, 256 features at a time (fp32: 128)."""
    return _accumulating(_chip(capability).backward, dim, dtype)


def prototype_tile(dim: int, dtype: torch.dtype, capability: int = 0) -> Tile:
    """Return the tile for the gradients of DINO's rows and prototypes, which need more registers."""
    return _accumulating(_chip(capability).prototypes, dim, dtype)


def attention_tile(dim: int, dtype: torch.dtype, capability: int = 0) -> Tile:
    """Return the tile for attention. It has fewer rows, because a running maximum takes registers too."""
    return replace(prototype_tile(dim, dtype, capability), block_m=64)


def _chip(capability: int) -> _Chip:
    return _SMALL if capability in _SMALL_CAPABILITIES else _CHIPS.get(capability // 10, _CHIPS[0])


def _accumulating(table: Sizes, dim: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return Tile(64, 32, *_features(dim, resident=64, part=32, out=128), 4, 2)
    return _half(table, dim, out=256)


def _half(table: Sizes, dim: int, out: int = 16) -> Tile:
    rows, columns, warps, stages = table[next((size for size in (64, 128, 256) if dim <= size), 0)]
    return Tile(rows, columns, *_features(dim, resident=256, part=64, out=out), warps, stages)


def _features(dim: int, *, resident: int, part: int, out: int = 16) -> tuple[int, int]:
    """Return the features per read of a row and per write of its gradient: all, padded for ``tl.dot``, or a part."""
    padded = max(16, 1 << (dim - 1).bit_length())
    return (padded, padded) if padded <= resident else (part, min(out, padded))
