"""The sums of cosines and sines as a torch operator with its gradient: ``torch.compile`` sees one node for each."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu

torch.library.define(
    "fasttrain::characteristic_sums", "(Tensor z, Tensor slices, int knots, float limit, str backend) -> Tensor"
)
torch.library.define(
    "fasttrain::characteristic_gradient",
    "(Tensor z, Tensor slices, Tensor of_sums, float limit, str backend) -> Tensor",
)
characteristic_sums = torch.ops.fasttrain.characteristic_sums.default
_gradient = torch.ops.fasttrain.characteristic_gradient.default


def _kernels(backend: str) -> ModuleType:
    return import_module(f"{__package__}.launch") if backend == "triton" else cpu


def _run(z: Tensor, slices: Tensor, knots: int, limit: float, backend: str) -> Tensor:
    result: Tensor = _kernels(backend).sums(z, slices, knots, limit)
    return result


def _run_backward(z: Tensor, slices: Tensor, of_sums: Tensor, limit: float, backend: str) -> Tensor:
    dz: Tensor = _kernels(backend).gradient(z, slices, of_sums, limit)
    return dz


def _sum_type(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


for _name, _function, _shape in (
    (
        "characteristic_sums",
        _run,
        lambda z, slices, knots, *_: z.new_empty(z.shape[0], 2, knots - 1, slices.shape[1], dtype=_sum_type(z)),
    ),
    ("characteristic_gradient", _run_backward, lambda z, *_: z.new_empty(z.shape, dtype=_sum_type(z))),
):
    torch.library.impl(f"fasttrain::{_name}", ("cpu", "cuda"), _function)
    torch.library.register_fake(f"fasttrain::{_name}", _shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, slices, _, ctx.limit, ctx.backend = inputs
    ctx.save_for_backward(z, slices)


def _backprop(ctx: Any, of_sums: Tensor) -> tuple[Any, ...]:
    z, slices = ctx.saved_tensors
    return _gradient(z, slices, of_sums, ctx.limit, ctx.backend).to(z.dtype), None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("the characteristic function has no second derivative; use backend='eager'")


torch.library.register_autograd("fasttrain::characteristic_sums", _backprop, setup_context=_save)
torch.library.register_autograd("fasttrain::characteristic_gradient", _no_second_derivative)
