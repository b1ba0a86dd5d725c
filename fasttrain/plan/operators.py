"""The kernels that cross ranks, as operators: without them they are called as functions, which need numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..kernels.similarity import ranks

_OURS = torch.ops.fasttrain
Rows = tuple[Tensor, Tensor] | None


class _Operators:
    """What ``similarity.cpu`` and ``similarity.launch`` have, by the operators' own shapes."""

    @staticmethod
    def self_lse(
        x: Tensor, gain: Tensor | None, *, scale: float, exclude_self: bool, unit_norm: bool
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _OURS.self_lse(x, gain, scale, exclude_self, unit_norm, "triton")
        return found

    @staticmethod
    def pair_lse(
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        *,
        scale: float,
        excluded: int | None,
        unit_norm: bool,
        columns: bool,
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = _OURS.pair_lse(x, y, bias, gain, scale, excluded, unit_norm, columns, "triton")
        return found

    @staticmethod
    def pair_backward(
        x: Tensor,
        y: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        rows: Rows,
        cols: Rows,
        *,
        scale: float,
        excluded: int | None,
        unit_norm: bool,
        need_x: bool,
        need_y: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        none = x.new_empty(0)
        row, row_grad = rows or (none, None)
        column, column_grad = cols or (none, None)
        options = (scale, excluded, unit_norm, need_x, need_y, "triton")
        found: tuple[Tensor, Tensor, Tensor] = _OURS.pair_lse_backward(
            x, y, bias, gain, row, column, row_grad, column_grad, *options
        )
        return found


@contextmanager
def kernels_as_operators() -> Iterator[None]:
    """Within, the kernels that cross ranks are operators."""
    names = vars(ranks)
    functions = names["kernels"]
    names["kernels"] = lambda backend: _Operators
    try:
        yield
    finally:
        names["kernels"] = functions
