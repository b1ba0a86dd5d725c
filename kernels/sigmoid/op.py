"""The sigmoid loss as a torch operator, which returns its gradients up to a factor: ``torch.compile`` sees one node."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import cpu

torch.library.define(
    "fasttrain::sigmoid_terms",
    "(Tensor x, Tensor y, Tensor scale, Tensor bias, int first, bool need_x, bool need_y, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
sigmoid_terms = torch.ops.fasttrain.sigmoid_terms.default


def _terms(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, first: int, need_x: bool, need_y: bool, backend: str
) -> cpu.Terms:
    run = import_module(f"{__package__}.launch") if backend == "triton" else cpu
    terms: cpu.Terms = run.terms(x, y, scale, bias, first, need_x, need_y)
    return terms


def _shapes(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, first: int, need_x: bool, need_y: bool, backend: str
) -> cpu.Terms:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    shapes = ((), (), x.shape if need_x else (0,), y.shape if need_y else (0,))
    loss, total, of_x, of_y = (x.new_empty(shape, dtype=kind) for shape in shapes)
    return loss, total, of_x, of_y


torch.library.impl("fasttrain::sigmoid_terms", ("cpu", "cuda"), _terms)
torch.library.register_fake("fasttrain::sigmoid_terms", _shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: cpu.Terms) -> None:
    x, y, scale, bias, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.types = (y.dtype, bias.dtype)
    ctx.save_for_backward(x, scale, *output[1:])


def _backprop(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    x, scale, total, of_x, of_y = ctx.saved_tensors
    need_x, need_y, need_scale, need_bias, *_ = ctx.needs_input_grad
    y_type, bias_type = ctx.types
    return (
        (of_x * (grad * scale)).to(x.dtype) if need_x else None,
        (of_y * (grad * scale)).to(y_type) if need_y else None,
        ((x * of_x).sum() * grad).to(scale.dtype) if need_scale else None,
        (total * grad).to(bias_type) if need_bias else None,
        *[None] * 4,
    )


torch.library.register_autograd("fasttrain::sigmoid_terms", _backprop, setup_context=_save)
