"""The CPU path: square tiles of scores. For rows among themselves, a tile also serves the rows of its columns.

The same code serves fp64, and CUDA tensors of types that the Triton kernel does not support.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import at_least_single
from ..spans import equal_spans

_TILE = 768


def nearest(x: Tensor, y: Tensor | None, excluded: int | None) -> Tensor:
    """Return the j of the largest ``<x_i, y_j>`` [N], for x [N, D] and y [M, D]; x itself if y is None."""
    x = at_least_single(x)
    symmetric = y is None
    y = x if y is None else at_least_single(y)
    top, place = x.new_full((len(x),), -torch.inf), x.new_zeros(len(x), dtype=torch.int64)
    row_spans, col_spans = equal_spans(len(x), _TILE), equal_spans(len(y), _TILE)
    buffer = x.new_empty(row_spans[0].stop * col_spans[0].stop)
    for number, i in enumerate(row_spans):
        for j in col_spans[number if symmetric else 0 :]:
            height, width = i.stop - i.start, j.stop - j.start
            tile = buffer[: height * width].view(height, width)
            torch.mm(x[i], y[j].T, out=tile)  # autocast does not change calls with out=
            if excluded is not None and -height < (offset := i.start + excluded - j.start) < width:
                tile.diagonal(offset).fill_(-torch.inf)
            _update(top[i], place[i], tile.max(1), j.start)
            if symmetric and i != j:
                _update(top[j], place[j], tile.max(0), i.start)
    return place


def _update(top: Tensor, place: Tensor, maxima: tuple[Tensor, Tensor], start: int) -> None:
    """Replace maxima and their places by a later tile's where the tile's are larger. NaN is the largest."""
    values, places = maxima
    better = (values > top) | values.isnan()
    torch.where(better, values, top, out=top)
    torch.where(better, places + start, place, out=place)
