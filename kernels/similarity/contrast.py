"""Contrastive losses as one operator, ``fasttrain::contrastive_loss``, with their gradients in closed form.

    joint       l_i = log sum_{j != i} e^s_ij - s_i,i'     x = y = both views' rows, i' the other view of row i's image
    in batch    l_i = log sum_j e^s_ij - s_ii              x = q, y = k
    queue       l_i = log(e^p_i + sum_j e^s_ij) - p_i      x = q, y = queue,  p_i = scale <q_i, k_i>

The loss is the mean of l_i. With P_ij = e^(s_ij - lse_i), the gradient of the scores is (P - positives) / rows. For a
queue, both the row of P and the positive have the weight 1 - e^p_i / (e^p_i + sum_j e^s_ij).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import differentiable, opaque
from ..precision import accumulable, accumulation_type
from . import cpu
from .op import gain_gradient, kernels, times_gain

Gradients = tuple[Tensor, Tensor, Tensor]


def _in_forward(
    q: Tensor, queue: Tensor | None, joint: bool, need_q: bool, need_k: bool, need_queue: bool, backend: str
) -> bool:
    """Return whether the forward pass computes the gradients. The tiles of both views' rows have half of the work."""
    single = not joint or cpu.is_kept(2 * q.shape[0])
    return backend == "cpu" and queue is None and single and (need_q or need_k)


def _attends(queue: Tensor | None, need_q: bool, need_queue: bool, backend: str) -> bool:
    """Return whether the pass over a queue without gradient returns the mean of its rows, from which dq follows."""
    return backend == "cpu" and queue is not None and need_q and not need_queue


def _contrastive_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None,
    gain: Tensor | None,
    scale: float,
    joint: bool,
    need_q: bool,
    need_k: bool,
    need_queue: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and for the backward pass: the gradients, or the log-sum-exps and the mean of the columns.

    Both gradients of ``joint`` are one matrix [2 B, D].
    """
    if _in_forward(q, queue, joint, need_q, need_k, need_queue, backend):
        loss, gradients = cpu.contrast(q, k, gain, scale=scale, joint=joint, need_q=need_q, need_k=need_k)
        return loss, *gradients
    module, options = kernels(backend), {"scale": scale, "unit_norm": True}
    attended = q.new_empty(0, 0, dtype=accumulation_type(q))
    if joint:
        lse, _ = module.self_lse(torch.cat([q, k]), gain, exclude_self=True, **options)
    else:
        columns, attend = k if queue is None else queue, _attends(queue, need_q, need_queue, backend)
        lse, _, attended = module.pair_lse(
            q, columns, None, gain, excluded=None, columns=False, attend=attend, **options
        )
    positives = _positives(q, k, gain, scale)
    if queue is not None:
        return torch.nn.functional.softplus(lse - positives).mean(), lse, attended
    return lse.mean() - positives.mean(), lse, attended


def _shapes(
    q: Tensor, k: Tensor, queue: Tensor | None, gain: Tensor | None, scale: float, joint: bool, *needs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_q, need_k, need_queue, backend = needs

    def new(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=accumulation_type(q))

    if _in_forward(q, queue, joint, *needs):
        if joint:
            return new(), new(2 * q.shape[0], q.shape[1]), new(0, 0)
        return new(), new(*(q.shape if need_q else (0, 0))), new(*(k.shape if need_k else (0, 0)))
    attend = _attends(queue, need_q, need_queue, backend)
    return new(), new(q.shape[0] * (1 + joint)), new(*(q.shape if attend else (0, 0)))


def _contrastive_loss_backward(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None,
    gain: Tensor | None,
    saved: list[Tensor],
    loss_grad: Tensor,
    scale: float,
    joint: bool,
    need_q: bool,
    need_k: bool,
    need_queue: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and queue divided by the gain, in the type of accumulation.

    With ``joint`` the first one is the gradient of the rows of q and k, [2 B, D].
    """
    dq, dk, dqueue = (q.new_empty(0, 0, dtype=accumulation_type(q)) for _ in range(3))
    module, (lse, attended) = kernels(backend), saved
    share, options = loss_grad / len(q), {"scale": scale, "unit_norm": True}
    if joint:
        rows, weights = torch.cat([q, k]), (lse, (share / 2).expand(2 * len(q)))
        positive = len(q), share
        both = module.self_backward(rows, gain, weights, attended, exclude_self=True, positive=positive, **options)
        return both, dk, dqueue
    if queue is None:
        weights, needs = (lse, share.expand(len(q))), {"need_x": need_q, "need_y": need_k}
        dq, dk, _ = module.pair_backward(
            q, k, None, gain, weights, None, excluded=None, positive=(0, share), **needs, **options
        )
        return dq, dk, dqueue
    weight = share * (lse - _positives(q, k, gain, scale)).sigmoid()
    of_positives = (weight * -scale)[:, None]
    if len(attended):
        dq = attended * -of_positives
    else:
        needs = {"need_x": need_q, "need_y": need_queue}
        dq, dqueue, _ = module.pair_backward(
            q, queue, None, gain, (lse, weight), None, excluded=None, **needs, **options
        )
    if need_q:
        dq = torch.addcmul(dq, accumulable(k), of_positives)
    return dq, accumulable(q) * of_positives if need_k else dk, dqueue


def _backward_shapes(q: Tensor, k: Tensor, queue: Tensor | None, *args: Any) -> Gradients:
    *_, joint, need_q, need_k, need_queue, _ = args
    kind = accumulation_type(q)
    of_q, of_k = q.shape if need_q else (0, 0), k.shape if need_k else (0, 0)
    if joint:
        of_q, of_k = (2 * q.shape[0], q.shape[1]), (0, 0)
    dq, dk = (q.new_empty(shape, dtype=kind) for shape in (of_q, of_k))
    return dq, dk, q.new_empty(queue.shape if need_queue and queue is not None else (0, 0), dtype=kind)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _backprop(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, queue, gain, first, second = ctx.saved_tensors
    of_q, of_k, of_queue, of_gain, *_ = ctx.needs_input_grad
    joint, dgain = ctx.options[1], None
    if first.ndim == 1:
        dq, dk, dqueue = _backward(q, k, queue, gain, [first, second], loss_grad, *ctx.options)
    else:
        dq, dk = first * loss_grad, second * loss_grad
    if joint:
        dq, dk = dq.chunk(2)
    if of_gain:  # with both views' rows on both sides of the scores, <x, dx> counts them twice
        dgain = gain_gradient(q, dq, gain)
        dgain = (dgain + gain_gradient(k, dk, gain)) / 2 if joint else dgain
    return (
        times_gain(dq, gain).to(q.dtype) if of_q else None,
        times_gain(dk, gain).to(k.dtype) if of_k else None,
        times_gain(dqueue, gain).to(queue.dtype) if of_queue else None,
        dgain,
        *[None] * 6,
    )


def _positives(q: Tensor, k: Tensor, gain: Tensor | None, scale: float) -> Tensor:
    """Return ``scale <q_i, k_i>``, in fp32 for half precision."""
    return times_gain((accumulable(q) * accumulable(k)).sum(1).mul_(scale), gain)


_loss = differentiable(_contrastive_loss, _shapes, _save, _backprop)
_backward = opaque(_contrastive_loss_backward, _backward_shapes)


def contrastive_loss(
    q: Tensor, k: Tensor, queue: Tensor | None, gain: Tensor | None, scale: float, *, joint: bool, backend: str
) -> Tensor:
    """Return the loss. Gradients cost only if required."""
    learnt = gain is not None and gain.requires_grad
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (q, k, queue)]
    if torch.is_grad_enabled() and learnt:
        needs = [True, needs[1] or joint, needs[2]]
    loss: Tensor = _loss(q, k, queue, gain, scale, joint, *needs, backend)[0]
    return loss
