"""The log-sum-exps as operators: shapes, gradients, and the choice between Triton and the CPU tiles.

There are two operators, ``fasttrain::pair_lse`` and ``fasttrain::self_lse``, and their gradients. ``gain`` is a
learnable factor of ``scale``. The scores are linear in gain as well as in x, so by Euler's identity the gradient of
gain follows from that for x:  dL/dgain = <x, dL/dx> / gain. The backward operators return dL/dx / gain and dL/dy /
gain, which exist for a gain of 0, too.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from ..operators import differentiable, opaque
from ..precision import accumulation_type
from . import cpu


def kernels(backend: str) -> ModuleType:
    """Return the module of a backend."""
    return import_module(f"{__package__}.launch") if backend == "triton" else cpu


def times_gain(gradient: Tensor, gain: Tensor | None) -> Tensor:
    """Return the gradient of rows from what a backward operator returns, which is divided by the gain."""
    return gradient if gain is None else gradient * gain.reshape(())


def gain_gradient(x: Tensor, dx: Tensor, gain: Tensor) -> Tensor:
    """Return the gradient of the gain, in its shape and type. ``dx`` is divided by the gain."""
    return (x * dx).sum().reshape(gain.shape).to(gain)


# Rows of x with rows of y


def _pair_lse(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    scale: float,
    excluded: int | None,
    unit_norm: bool,
    columns: bool,
    attend: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    results: tuple[Tensor, Tensor, Tensor] = kernels(backend).pair_lse(
        x, y, bias, gain, scale=scale, excluded=excluded, unit_norm=unit_norm, columns=columns, attend=attend
    )
    return results


def _pair_lse_shapes(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, columns, attend, backend = args
    sizes = (x.shape[0],), (y.shape[0] if columns else 0,), x.shape if attend and backend == "cpu" else (0, 0)
    rows, cols, means = (x.new_empty(size, dtype=accumulation_type(x)) for size in sizes)
    return rows, cols, means


def _pair_lse_backward(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    row_grad: Tensor | None,
    col_grad: Tensor | None,
    scale: float,
    excluded: int | None,
    unit_norm: bool,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    of_rows = None if row_grad is None else (rows, row_grad)
    of_cols = None if col_grad is None else (cols, col_grad)
    options = {"scale": scale, "excluded": excluded, "unit_norm": unit_norm, "need_x": need_x, "need_y": need_y}
    grads: tuple[Tensor, Tensor, Tensor] = kernels(backend).pair_backward(x, y, bias, gain, of_rows, of_cols, **options)
    return grads


def _pair_backward_shapes(x: Tensor, y: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_x, need_y, _ = args
    kind = accumulation_type(x)
    dx, dy = (z.new_empty(z.shape if need else (0,), dtype=kind) for z, need in ((x, need_x), (y, need_y)))
    return dx, dy, x.new_empty(0 if bias is None else y.shape[0], dtype=kind)


def _save_pair(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, bias, gain, *ctx.options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, y, bias, gain, *output)


def _backprop_pair(ctx: Any, row_grad: Tensor, col_grad: Tensor, _: Any) -> tuple[Any, ...]:
    x, y, bias, gain, rows, cols, means = ctx.saved_tensors
    scale, excluded, unit_norm, columns, _, backend = ctx.options
    of_x, of_y, of_bias, of_gain, *_ = ctx.needs_input_grad
    if means.shape[0]:
        dx = means * (scale * row_grad)[:, None]
    else:
        options = scale, excluded, unit_norm, of_x or of_gain, of_y, backend
        of_columns = col_grad if columns else None
        dx, dy, dbias = pair_lse_backward(x, y, bias, gain, rows, cols, row_grad, of_columns, *options)
    return (
        times_gain(dx, gain).to(x.dtype) if of_x else None,
        times_gain(dy, gain).to(y.dtype) if of_y else None,
        dbias.to(bias.dtype) if of_bias else None,
        gain_gradient(x, dx, gain) if of_gain else None,
        *[None] * 6,
    )


pair_lse_backward = opaque(_pair_lse_backward, _pair_backward_shapes)
pair_lse = differentiable(_pair_lse, _pair_lse_shapes, _save_pair, _backprop_pair)


# Rows of x with themselves


def _self_lse(
    x: Tensor, gain: Tensor | None, scale: float, exclude_self: bool, unit_norm: bool, backend: str
) -> tuple[Tensor, Tensor]:
    lse_and_kept: tuple[Tensor, Tensor] = kernels(backend).self_lse(
        x, gain, scale=scale, exclude_self=exclude_self, unit_norm=unit_norm
    )
    return lse_and_kept


def _self_lse_shapes(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    kind, rows = accumulation_type(x), x.shape[0]
    kept = rows if args[-1] == "cpu" and cpu.is_kept(rows) else 0
    return x.new_empty(rows, dtype=kind), x.new_empty(kept, kept, dtype=kind)


def _self_lse_backward(
    x: Tensor,
    gain: Tensor | None,
    lse: Tensor,
    kept: Tensor,
    grad: Tensor,
    scale: float,
    exclude_self: bool,
    unit_norm: bool,
    backend: str,
) -> Tensor:
    dx: Tensor = kernels(backend).self_backward(
        x, gain, (lse, grad), kept, scale=scale, exclude_self=exclude_self, unit_norm=unit_norm
    )
    return dx


def _self_backward_shapes(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=accumulation_type(x))


def _save_self(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gain, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gain, *output)


def _backprop_self(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    x, gain, lse, kept = ctx.saved_tensors
    of_x, of_gain, *_ = ctx.needs_input_grad
    dx = _self_backward(x, gain, lse, kept, grad, *ctx.options)
    # x is on both sides of the scores, so <x, dL/dx> counts them twice.
    return (
        times_gain(dx, gain).to(x.dtype) if of_x else None,
        gain_gradient(x, dx, gain) / 2 if of_gain else None,
        *[None] * 4,
    )


_self_backward = opaque(_self_lse_backward, _self_backward_shapes)
self_lse = differentiable(_self_lse, _self_lse_shapes, _save_self, _backprop_self)
