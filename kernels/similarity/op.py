"""The reductions as torch operators: schemas, shapes, gradients, and the choice between Triton and the CPU tiles.

There are two operators, ``fasttrain::pair_lse`` and ``fasttrain::self_lse``, and their gradients. ``torch.compile``,
FSDP and DeepSpeed see each as one node. ``gain`` is a learnable factor of ``scale``. The scores are linear in gain as
well as in x, so by Euler's identity the gradient of gain follows from that for x:  dL/dgain = <x, dL/dx> / gain. The
backward operators return dL/dx / gain and dL/dy / gain, which exist for a gain of 0, too.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..precision import accumulation_type
from . import cpu

_SCHEMAS = {
    "pair_lse": "(Tensor x, Tensor y, Tensor? bias, Tensor? gain, float scale, int? excluded, bool unit_norm, "
    "bool columns, str backend) -> (Tensor, Tensor)",
    "pair_lse_backward": "(Tensor x, Tensor y, Tensor? bias, Tensor? gain, Tensor rows, Tensor cols, "
    "Tensor? row_grad, Tensor? col_grad, float scale, int? excluded, bool unit_norm, bool need_x, bool need_y, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    "self_lse": "(Tensor x, Tensor? gain, float scale, bool exclude_self, bool unit_norm, str backend) "
    "-> (Tensor, Tensor)",
    "self_lse_backward": "(Tensor x, Tensor? gain, Tensor lse, Tensor kept, Tensor grad, float scale, "
    "bool exclude_self, bool unit_norm, str backend) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fasttrain::{_name}", _schema)

pair_lse = torch.ops.fasttrain.pair_lse.default
self_lse = torch.ops.fasttrain.self_lse.default
pair_lse_backward = torch.ops.fasttrain.pair_lse_backward.default
_self_lse_backward = torch.ops.fasttrain.self_lse_backward.default


def kernels(backend: str) -> ModuleType:
    """Return the module of a backend."""
    return import_module(f"{__package__}.launch") if backend == "triton" else cpu


# Forward


def _pair_lse(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    scale: float,
    excluded: int | None,
    unit_norm: bool,
    columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    lses: tuple[Tensor, Tensor] = kernels(backend).pair_lse(
        x, y, bias, gain, scale=scale, excluded=excluded, unit_norm=unit_norm, columns=columns
    )
    return lses


def _pair_lse_shapes(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    kind = accumulation_type(x)
    columns = args[5]
    return x.new_empty(x.shape[0], dtype=kind), x.new_empty(y.shape[0] if columns else 0, dtype=kind)


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


# Backward


def _pair_backward(
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
    grads: tuple[Tensor, Tensor, Tensor] = kernels(backend).pair_backward(
        x,
        y,
        bias,
        gain,
        None if row_grad is None else (rows, row_grad),
        None if col_grad is None else (cols, col_grad),
        scale=scale,
        excluded=excluded,
        unit_norm=unit_norm,
        need_x=need_x,
        need_y=need_y,
    )
    return grads


def _pair_backward_shapes(x: Tensor, y: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    kind = accumulation_type(x)
    need_x, need_y = args[8:10]
    dx = (
        torch.empty_like(x, dtype=kind, memory_format=torch.contiguous_format) if need_x else x.new_empty(0, dtype=kind)
    )
    dy = (
        torch.empty_like(y, dtype=kind, memory_format=torch.contiguous_format) if need_y else x.new_empty(0, dtype=kind)
    )
    return dx, dy, x.new_empty(0 if bias is None else y.shape[0], dtype=kind)


def _self_backward(
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


for _name, _run, _shapes in (
    ("pair_lse", _pair_lse, _pair_lse_shapes),
    ("pair_lse_backward", _pair_backward, _pair_backward_shapes),
    ("self_lse", _self_lse, _self_lse_shapes),
    ("self_lse_backward", _self_backward, _self_backward_shapes),
):
    torch.library.impl(f"fasttrain::{_name}", ("cpu", "cuda"), _run)
    torch.library.register_fake(f"fasttrain::{_name}", _shapes)


# Autograd


def times_gain(gradient: Tensor, gain: Tensor | None) -> Tensor:
    """Return the gradient of rows from what a backward operator returns, which is divided by the gain."""
    return gradient if gain is None else gradient * gain.reshape(())


def gain_gradient(x: Tensor, dx: Tensor, gain: Tensor) -> Tensor:
    """Return the gradient of the gain, in its shape and type. ``dx`` is divided by the gain."""
    return (x * dx).sum().reshape(gain.shape).to(gain)


def _save_pair(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, bias, gain, *ctx.options = inputs
    ctx.save_for_backward(x, y, bias, gain, *output)


def _backprop_pair(ctx: Any, row_grad: Tensor | None, col_grad: Tensor | None) -> tuple[Any, ...]:
    x, y, bias, gain, rows, cols = ctx.saved_tensors
    scale, excluded, unit_norm, columns, backend = ctx.options
    of_x, of_y, of_bias, of_gain, *_ = ctx.needs_input_grad
    dx, dy, dbias = pair_lse_backward(
        x,
        y,
        bias,
        gain,
        rows,
        cols,
        row_grad,
        col_grad if columns else None,
        scale,
        excluded,
        unit_norm,
        of_x or of_gain,
        of_y,
        backend,
    )
    return (
        times_gain(dx, gain).to(x.dtype) if of_x else None,
        times_gain(dy, gain).to(y.dtype) if of_y else None,
        dbias.to(bias.dtype) if of_bias else None,
        gain_gradient(x, dx, gain) if of_gain else None,
        *[None] * 5,
    )


def _save_self(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gain, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, gain, *output)


def _backprop_self(ctx: Any, grad: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 6
    x, gain, lse, kept = ctx.saved_tensors
    of_x, of_gain, *_ = ctx.needs_input_grad
    dx = _self_lse_backward(x, gain, lse, kept, grad, *ctx.options)
    # x is on both sides of the scores, so <x, dL/dx> counts them twice.
    return (
        times_gain(dx, gain).to(x.dtype) if of_x else None,
        gain_gradient(x, dx, gain) / 2 if of_gain else None,
        *[None] * 4,
    )


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("the fused log-sum-exp has no second derivative; use backend='eager'")


torch.library.register_autograd("fasttrain::pair_lse", _backprop_pair, setup_context=_save_pair)
torch.library.register_autograd("fasttrain::self_lse", _backprop_self, setup_context=_save_self)
for _name in ("pair_lse_backward", "self_lse_backward"):
    torch.library.register_autograd(f"fasttrain::{_name}", _no_second_derivative)
