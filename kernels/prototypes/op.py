"""The loss over prototypes as an operator, ``fasttrain::prototype_loss``, with its gradient."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from ..operators import differentiable, is_plain, opaque
from ..precision import accumulation_type
from . import cpu
from .problem import Problem, Results


def _kernels(backend: str) -> ModuleType:
    return import_module(f"{__package__}.launch") if backend == "triton" else cpu


def _prototype_loss(
    student: Tensor,
    teacher: Tensor | None,
    prototypes: Tensor,
    teacher_prototypes: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    own: bool,
    marginal: bool,
    need_student: bool,
    need_prototypes: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = (student_scale, teacher_scale, own, marginal, need_student, need_prototypes)
    results: Results = _kernels(backend).loss(
        Problem(student, teacher, prototypes, teacher_prototypes, bias, weight, *options)
    )
    return results


def _shapes(*args: Any) -> Results:
    *inputs, backend = args
    problem = Problem(*inputs)
    results: Results = _kernels(backend).shapes(problem)
    return results


def _prototype_loss_backward(
    student: Tensor,
    teacher: Tensor | None,
    prototypes: Tensor,
    teacher_prototypes: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    saved: list[Tensor],
    loss_grad: Tensor,
    marginal_grad: Tensor,
    student_scale: float,
    teacher_scale: float,
    own: bool,
    marginal: bool,
    need_student: bool,
    need_prototypes: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = (student_scale, teacher_scale, own, marginal, need_student, need_prototypes)
    problem = Problem(student, teacher, prototypes, teacher_prototypes, bias, weight, *options)
    gradients: tuple[Tensor, Tensor] = _kernels(backend).backward(problem, saved, loss_grad, marginal_grad)
    return gradients


def _backward_shapes(student: Tensor, teacher: Tensor | None, prototypes: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    kind = accumulation_type(student)
    *_, need_student, need_prototypes, _ = args
    dh = student.new_empty(student.shape if need_student else (0, 0, 0), dtype=kind)
    return dh, prototypes.new_empty(prototypes.shape if need_prototypes else (0, 0), dtype=kind)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:6], *output[2:])


def _backprop(ctx: Any, loss_grad: Tensor, marginal_grad: Tensor, *_: Any) -> tuple[Any, ...]:
    inputs, saved = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    student, _, prototypes, *_ = inputs
    *_, of_student, of_prototypes, backend = ctx.options
    in_forward = backend == "cpu" and cpu.in_forward(Problem(*inputs, *ctx.options[:-1]))
    if in_forward and is_plain(loss_grad) and loss_grad == 1:
        # New memory for the gradient of 65,536 prototypes takes ten times longer than the product. Autograd does not
        # change what is saved for another backward pass.
        dh, dw = saved[:2]
    else:
        dh, dw = _backward(*inputs, saved, loss_grad, marginal_grad, *ctx.options)
    gradients = (dh.to(student.dtype) if of_student else None, None, dw.to(prototypes.dtype) if of_prototypes else None)
    return *gradients, *[None] * 10


prototype_loss = differentiable(_prototype_loss, _shapes, _save, _backprop)
_backward = opaque(_prototype_loss_backward, _backward_shapes)
