"""The terms of the prototypes as a torch operator, ``fasttrain::prototype_terms``, with its gradient."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..similarity.op import accumulation_type
from . import cpu

torch.library.define(
    "fasttrain::prototype_terms",
    "(Tensor student, Tensor? teacher, Tensor student_prototypes, Tensor? teacher_prototypes, Tensor? bias, "
    "Tensor? weights, float student_scale, float teacher_scale, bool energy, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fasttrain::prototype_terms_backward",
    "(Tensor student, Tensor? teacher, Tensor student_prototypes, Tensor? teacher_prototypes, Tensor? bias, "
    "Tensor? weights, Tensor lse, Tensor teacher_lse, Tensor energies, Tensor kept, Tensor kept_teacher, "
    "Tensor? lse_grad, Tensor? attended_grad, Tensor? marginal_grad, Tensor? energy_grad, float student_scale, "
    "float teacher_scale, bool need_student, bool need_prototypes, str backend) "
    "-> (Tensor, Tensor)",
)

prototype_terms = torch.ops.fasttrain.prototype_terms.default
_backward = torch.ops.fasttrain.prototype_terms_backward.default


def _kernels(backend: str) -> ModuleType:
    return import_module(f"{__package__}.launch") if backend == "triton" else cpu


def _terms(*args: Any) -> cpu.Terms:
    *tensors, student_scale, teacher_scale, energy, backend = args
    options = {"student_scale": student_scale, "teacher_scale": teacher_scale, "energy": energy}
    terms: cpu.Terms = _kernels(backend).terms(*tensors, **options)
    return terms


def _terms_shapes(
    student: Tensor,
    teacher: Tensor | None,
    prototypes: Tensor,
    teacher_prototypes: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    student_scale: float,
    teacher_scale: float,
    energy: bool,
    backend: str,
) -> cpu.Terms:
    def new(*shape: int) -> Tensor:
        return student.new_empty(shape, dtype=accumulation_type(student))

    def kept(count: int) -> Tensor:
        saved = backend == "cpu" and count and cpu.is_kept(count, prototypes.shape[0])
        return new(count, prototypes.shape[0]) if saved else new(0, 0)

    rows, dim = student.shape
    return (
        new(rows),
        new(0) if teacher is None else new(teacher.shape[0], dim),
        new(0 if teacher is None else teacher.shape[0]),
        new(0 if weights is None else prototypes.shape[0]),
        new(rows if energy else 0),
        kept(rows),
        kept(0 if teacher is None else teacher.shape[0]),
    )


def _terms_backward(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, student_scale, teacher_scale, need_student, need_prototypes, backend = args
    options = {"student_scale": student_scale, "teacher_scale": teacher_scale}
    options |= {"need_student": need_student, "need_prototypes": need_prototypes}
    grads: tuple[Tensor, Tensor] = _kernels(backend).backward(*tensors, **options)
    return grads


def _backward_shapes(student: Tensor, teacher: Tensor | None, prototypes: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    kind = accumulation_type(student)
    *_, need_student, need_prototypes, _ = args
    dh = student.new_empty(student.shape if need_student else (0,), dtype=kind)
    return dh, prototypes.new_empty(prototypes.shape if need_prototypes else (0,), dtype=kind)


for _name, _run, _shapes in (
    ("prototype_terms", _terms, _terms_shapes),
    ("prototype_terms_backward", _terms_backward, _backward_shapes),
):
    torch.library.impl(f"fasttrain::{_name}", ("cpu", "cuda"), _run)
    torch.library.register_fake(f"fasttrain::{_name}", _shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: cpu.Terms) -> None:
    *tensors, ctx.student_scale, ctx.teacher_scale, _, ctx.backend = inputs
    lse, _, teacher_lse, _, energies, kept, kept_teacher = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(teacher_lse, kept, kept_teacher)
    ctx.save_for_backward(*tensors, lse, teacher_lse, energies, kept, kept_teacher)


def _backprop(
    ctx: Any,
    lse_grad: Tensor | None,
    attended_grad: Tensor | None,
    _: None,
    marginal_grad: Tensor | None,
    energy_grad: Tensor | None,
    *_kept: None,
) -> tuple[Any, ...]:
    # A term that was not requested is empty, and so is its gradient.
    grads = [g if g is not None and g.numel() else None for g in (lse_grad, attended_grad, marginal_grad, energy_grad)]
    *tensors, lse, teacher_lse, energies, kept, kept_teacher = ctx.saved_tensors
    student, _, prototypes, *_ = tensors
    if all(g is None for g in grads):
        return (None,) * 10
    of_student, _, of_prototypes, *_ = ctx.needs_input_grad
    options = (ctx.student_scale, ctx.teacher_scale, of_student, of_prototypes, ctx.backend)
    dh, dw = _backward(*tensors, lse, teacher_lse, energies, kept, kept_teacher, *grads, *options)
    return (
        dh.to(student.dtype) if of_student else None,
        None,
        dw.to(prototypes.dtype) if of_prototypes else None,
        *[None] * 7,
    )


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    raise RuntimeError("the fused prototype terms have no second derivative; use backend='eager'")


torch.library.register_autograd("fasttrain::prototype_terms", _backprop, setup_context=_save)
torch.library.register_autograd("fasttrain::prototype_terms_backward", _no_second_derivative)
