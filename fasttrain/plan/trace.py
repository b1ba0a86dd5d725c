"""One step of a method on tensors that have shapes only: whatever the network, it is counted, not calculated."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from ..kernels.collectives import start_gather
from ..methods import Method
from ..methods.base import Step
from ..models.batchnorm import synchronise
from ..pipelines import ViewRecipe
from .group import Message, PlannedGroup, planned_group
from .ledger import Kept, Ledger, Work
from .linear import linear_of_zero3
from .operators import kernels_as_operators

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What autocast lowers products to at a precision; fp32 is as it is."""
_BATCH_NORM = "BatchNorm statistics"


@dataclass(frozen=True)
class Trace:
    """What one rank does in a micro-step, forward and backward."""

    batch: int
    kept: int
    """Bytes that the networks keep for the backward pass, inputs of recomputed blocks included."""
    kept_by_loss: int
    """Bytes that the loss keeps: rows, prototypes and numbers a row."""
    weight_copies: int
    """Bytes of the weights in autocast's precision, which it keeps from the first product to the backward pass."""
    temporary: int
    """Bytes that are alive at the worst moment beyond what is kept, the gradient of the parameter in hand included."""
    inputs: int
    """Bytes of the batch's views."""
    work: tuple[Work, ...]
    messages: tuple[Message, ...]
    """What BatchNorm, the loss and the centre send."""
    uses: tuple[tuple[str, ...], ...]
    """Names of the parameters that the modules use, call by call, first all of forward, then all of backward."""

    @property
    def flops(self) -> int:
        """Floating-point operations of the micro-step."""
        return sum(work.flops for work in self.work)


def trace(
    method: Method,
    views: ViewRecipe,
    batch: int,
    *,
    precision: str,
    world: int,
    stage: int = 0,
    on_gpu: bool = True,
) -> Trace:
    """Count a micro-step of ``batch`` images on one of ``world`` ranks.

    ``method`` is left as it is; it may be on the device ``meta``. ``precision`` is fp32, bf16 or fp16, as the engine
    lowers products to. At ``stage`` 3 linear layers are DeepSpeed's. With ``on_gpu`` BatchNorm over ranks is
    ``torch.nn.SyncBatchNorm``, else the CPU's own.
    """
    method = copy.deepcopy(method)
    group = planned_group(world)
    with FakeTensorMode(), kernels_as_operators():
        forget_numbers(method)
        if group is not None:
            method.group = group
            if method.synchronised_batch_norm and on_gpu:
                _exchange_statistics(method, group)
            elif method.synchronised_batch_norm:
                synchronise(method, group)
        images = [torch.empty(n, batch, views.channels, size, size) for size, n in views.groups]
        indices = torch.arange(batch)
        for parameter in method.parameters():  # gradients are counted apart
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        step = Step(0, 1, 1, measure=False)  # as most steps are; what is logged needs a few rows more
        ledger = Ledger(method.parameters())
        kept = Kept(method, images, ledger.weight_copies)
        linear = linear_of_zero3 if stage == 3 else nullcontext
        with ledger, kept.counting(), linear():
            autocast = torch.autocast("cpu", LOW.get(precision), enabled=precision in LOW)
            with autocast, _uses(method) as uses:  # of recomputed blocks weights are there already, or needed at once
                loss = method(images, step, indices).loss
            alive = ledger.alive
            loss.backward()
        by_loss, copies = kept.total("loss"), kept.total("copies")
        # Where blocks are recomputed, what they begin with is kept beside autograd, which does not tell of it.
        network = max(alive - by_loss - copies, kept.total("network"))
        return Trace(
            batch=batch,
            kept=network,
            kept_by_loss=by_loss,
            weight_copies=copies,
            temporary=max(ledger.peak - network - by_loss - copies, 0),
            inputs=sum(view.nbytes for view in images),
            work=tuple(ledger.work),
            messages=tuple(group.messages) if group is not None else (),
            uses=tuple(uses),
        )


def forget_numbers(module: nn.Module) -> None:
    """Leave a module's tensors their shapes only, on the CPU as far as torch is told. Within FakeTensorMode."""

    def like(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")

    module._apply(like)  # type: ignore[no-untyped-call]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _uses(method: nn.Module) -> Iterator[list[tuple[str, ...]]]:
    """Fill a list with the names of the parameters that modules hold themselves, in the order of their calls.

    The calls of the backward pass are those of the forward pass that need a gradient, the last one first.
    """
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    forward: list[tuple[str, ...]] = []
    backward: list[tuple[str, ...]] = []

    def note(module: nn.Module, _: Any) -> None:
        held = tuple(names[id(parameter)] for parameter in module.parameters(recurse=False))
        if held:
            forward.append(held)
            if torch.is_grad_enabled():
                backward.append(held)

    hooks = [module.register_forward_pre_hook(note) for module in method.modules()]
    uses: list[tuple[str, ...]] = []
    try:
        yield uses
    finally:
        for hook in hooks:
            hook.remove()
        uses += [*forward, *reversed(backward)]


class _Exchange(torch.autograd.Function):
    """What SyncBatchNorm sends for a layer, around the BatchNorm that works on this rank's batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channels: int, group: PlannedGroup) -> Tensor:
        ctx.channels, ctx.group = channels, group
        with group.topic(_BATCH_NORM):  # mean, 1 / std, count
            start_gather(x.new_empty(1, 2 * channels + 1, dtype=torch.float32), group)()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with ctx.group.topic(_BATCH_NORM):
            dist.all_reduce(grad.new_empty(2 * ctx.channels, dtype=torch.float32), group=ctx.group)
        return grad, None, None


def _exchange_statistics(method: nn.Module, group: PlannedGroup) -> None:
    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not module.training:
            return inputs
        return (_Exchange.apply(inputs[0], module.num_features, group), *inputs[1:])

    for layer in method.modules():
        if isinstance(layer, _BatchNorm):
            layer.register_forward_pre_hook(before)
