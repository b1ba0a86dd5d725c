"""Run one micro-step of a method on tensors without values, and count it."""

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
from ..pipelines import ViewRecipe, sides
from .group import Message, PlannedGroup, planned_group
from .ledger import Kept, Ledger, Work
from .linear import linear_of_zero3

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of matrix products under autocast."""
_BATCH_NORM = "BatchNorm statistics"


@dataclass(frozen=True)
class Trace:
    """The work of one rank in a micro-step, forward and backward."""

    batch: int
    kept: int
    """Bytes that the networks save for the backward pass, including the inputs of recomputed blocks."""
    kept_by_loss: int
    """Bytes that the loss saves: projections, prototypes and values per row."""
    weight_copies: int
    """Bytes of the weights in autocast's precision, alive from their first product to the backward pass."""
    temporary: int
    """Further bytes that are alive at the worst moment, including the gradient of the current parameter."""
    inputs: int
    """Bytes of the batch's views."""
    calls: int
    """Operators that the host calls, views included."""
    work: tuple[Work, ...]
    messages: tuple[Message, ...]
    """Messages of BatchNorm, the loss and the centre."""
    uses: tuple[tuple[str, ...], ...]
    """Names of the parameters of every module call: first the forward calls, then the backward calls."""

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

    ``method`` is not changed and may be on the device ``meta``. ``precision`` is the engine's: fp32, bf16 or fp16. At
    ``stage`` 3, linear layers are DeepSpeed's. BatchNorm over ranks is ``torch.nn.SyncBatchNorm`` with ``on_gpu``, else
    the implementation for CPUs.
    """
    method = copy.deepcopy(method)
    group = planned_group(world)
    with FakeTensorMode():
        drop_values(method)
        if group is not None:
            method.group = group
            if method.synchronised_batch_norm and on_gpu:
                _exchange_statistics(method, group)
            elif method.synchronised_batch_norm:
                synchronise(method, group)
        images = [torch.empty(n, batch, views.channels, *sides(size)) for size, n in views.groups]
        indices = torch.arange(batch)
        for parameter in method.parameters():  # memory.gradient_bytes counts the gradients
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        step = Step(0, 1, 1, measure=False)  # most steps are not logged
        ledger = Ledger(method.parameters())
        kept = Kept(method, images, ledger.weight_copies)
        linear = linear_of_zero3 if stage == 3 else nullcontext
        with ledger, kept.counting(), linear():
            autocast = torch.autocast("cpu", LOW.get(precision), enabled=precision in LOW)
            with autocast, _uses(method) as uses:  # without the calls of the recomputation, which need no new weights
                loss = method(images, step, indices).loss
            alive = ledger.alive
            loss.backward()
        by_loss, copies = kept.total("loss"), kept.total("copies")
        # Checkpointed blocks save their inputs outside autograd, so the saved-tensor hooks do not see them.
        network = max(alive - by_loss - copies, kept.total("network"))
        return Trace(
            batch=batch,
            kept=network,
            kept_by_loss=by_loss,
            weight_copies=copies,
            temporary=max(ledger.peak - network - by_loss - copies, 0),
            inputs=sum(view.nbytes for view in images),
            calls=ledger.calls,
            work=tuple(ledger.work),
            messages=tuple(group.messages) if group is not None else (),
            uses=tuple(uses),
        )


def drop_values(module: nn.Module) -> None:
    """Replace a module's tensors by tensors without values, on the CPU. Call it in FakeTensorMode."""

    def like(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")

    replaced: dict[nn.Parameter, nn.Parameter] = {}  # several modules may share a parameter
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(like(parameter), parameter.requires_grad)
                layer._parameters[name] = replaced.setdefault(parameter, empty)
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                layer._buffers[name] = like(buffer)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _uses(method: nn.Module) -> Iterator[list[tuple[str, ...]]]:
    """Fill a list with the names of the modules' own parameters, in the order of the module calls.

    The calls of the backward pass are the forward calls with gradients, in reverse order.
    """
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    forward: list[tuple[str, ...]] = []
    backward: list[tuple[str, ...]] = []

    def record(module: nn.Module, _: Any) -> None:
        own = tuple(names[id(parameter)] for parameter in module.parameters(recurse=False))
        if own:
            forward.append(own)
            if torch.is_grad_enabled():
                backward.append(own)

    hooks = [module.register_forward_pre_hook(record) for module in method.modules()]
    uses: list[tuple[str, ...]] = []
    try:
        yield uses
    finally:
        for hook in hooks:
            hook.remove()
        uses += [*forward, *reversed(backward)]


class _Exchange(torch.autograd.Function):
    """The messages of SyncBatchNorm for a layer. The BatchNorm itself works on this rank's batch."""

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
