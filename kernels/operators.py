"""Reductions as torch operators: one function, its shapes and its gradient.

An eager call runs the function itself, inside a ``torch.autograd.Function``. ``torch.compile``, and tensors that are
more than a ``torch.Tensor`` (without values, sharded, ...), see the operator ``fasttrain::NAME``. torch infers its
schema from the annotations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Any, ...]


def opaque(run: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` without gradient, as the operator ``fasttrain::NAME`` where needed.

    ``shapes`` has the same arguments, and returns new tensors of the shapes and types of the results.
    """
    operator = torch.library.custom_op(f"fasttrain::{_name(run)}", run, mutates_args=(), device_types=("cpu", "cuda"))
    operator.register_fake(shapes)
    operator.register_autograd(_refuse)

    def call(x: Tensor, *args: Any) -> Any:
        return (run if is_plain(x) else operator)(x, *args)

    return call


def differentiable(
    run: Callable[..., Any],
    shapes: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Gradients],
) -> Callable[..., Any]:
    """Return ``run`` with first derivatives.

    ``save(ctx, inputs, output)`` saves for ``backward(ctx, *gradients)``, as in ``torch.library.register_autograd``.
    """
    operator = torch.library.custom_op(f"fasttrain::{_name(run)}", run, mutates_args=(), device_types=("cpu", "cuda"))
    operator.register_fake(shapes)
    operator.register_autograd(backward, setup_context=save)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            with torch.no_grad():
                results = backward(ctx, *gradients)
            if not torch.is_grad_enabled():
                return results
            inputs = [x for x in ctx.saved_tensors if x is not None and x.requires_grad]
            return tuple(x if x is None else _Once.apply(x, *inputs) for x in results)

    def call(x: Tensor, *args: Any) -> Any:
        return (Function.apply if is_plain(x) else operator)(x, *args)

    return call


class _Once(torch.autograd.Function):
    """A gradient whose own derivative is an error. Without it, it would be 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _refuse(ctx, *gradients)


def _refuse(ctx: Any, *gradients: Any) -> Gradients:
    raise RuntimeError("the fused reductions have no second derivative; use backend='eager'")


def _name(run: Callable[..., Any]) -> str:
    return run.__name__.lstrip("_")


def is_plain(x: Tensor) -> bool:
    """Return whether x has values and no other meaning, in an eager call."""
    return not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)
