"""Run the end of a step on tensors without values, and count it: clipping, optimizer and the teacher's average."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config.settings import TrainConfig
from ..engine.clipping import clip_each_parameter
from ..engine.rules import parameter_rules
from ..methods import Method
from ..methods.base import Step
from ..optim.optimizers import create_optimizer, parameter_groups
from .group import Message, planned_group
from .ledger import Ledger
from .trace import drop_values


@dataclass(frozen=True)
class Update:
    """The work of the update on one rank without sharding."""

    state: int
    """Bytes of the optimizer's state."""
    temporary: int
    """Bytes that the optimizer needs temporarily."""
    moved: int
    """Bytes that clipping and the optimizer read and write."""
    teacher_moved: int
    """Bytes that the teacher's average reads and writes."""
    messages: tuple[Message, ...]
    """Messages of the method after the step."""


def trace_update(method: Method, train: TrainConfig, *, world: int) -> Update:
    """Count one update of all trained parameters. ``method`` is not changed and may be on the device ``meta``."""
    method = copy.deepcopy(method)
    group = planned_group(world)
    with FakeTensorMode():
        drop_values(method)
        method.group = group
        groups = parameter_groups(method, train.weight_decay, parameter_rules(method, train))
        optimizer = create_optimizer(train.optimizer, groups, lr=train.lr)
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # the first step creates the state
        if train.clip_each and train.clip_grad:
            clip_each_parameter(optimizer, train.clip_grad, None)
        with Ledger(()) as update:
            if train.clip_grad and not train.clip_each:
                torch.nn.utils.clip_grad_norm_(trained, train.clip_grad)
            optimizer.step()
        with Ledger(()) as average:
            method.end_step(Step(0, 1, 1))
        tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return Update(
            state=sum(tensor.nbytes for tensor in tensors),
            temporary=update.peak,
            moved=sum(work.bytes for work in update.work),
            teacher_moved=sum(work.bytes for work in average.work),
            messages=tuple(group.messages) if group is not None else (),
        )
