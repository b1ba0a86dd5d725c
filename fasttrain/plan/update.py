"""The end of a step on tensors that have shapes only: clipping, the optimizer, and the teacher that follows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config.settings import TrainConfig
from ..engine.clipping import clip_each_parameter
from ..methods import Method
from ..methods.base import Step
from ..optim.optimizers import create_optimizer, parameter_groups
from .group import Message, planned_group
from .ledger import Ledger
from .trace import forget_numbers


@dataclass(frozen=True)
class Update:
    """What the update does, on one rank that holds everything whole."""

    state: int
    """Bytes of the optimizer's state."""
    temporary: int
    """Bytes that the optimizer takes for a while."""
    moved: int
    """Bytes that clipping and the optimizer read and write."""
    teacher_moved: int
    """Bytes that the teacher's average reads and writes."""
    messages: tuple[Message, ...]
    """What the method sends after the step."""


def trace_update(method: Method, train: TrainConfig, *, world: int) -> Update:
    """Count one update of all trained parameters; ``method`` is left as it is and may be on the device ``meta``."""
    method = copy.deepcopy(method)
    group = planned_group(world)
    with FakeTensorMode():
        forget_numbers(method)
        method.group = group
        rule_for = partial(method.parameter_rule, decay_all=train.decay_all)
        groups = parameter_groups(method, train.weight_decay, rule_for)
        optimizer = create_optimizer(train.optimizer, groups, lr=train.lr)
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes the state
        if train.clip_each and train.clip_grad:
            clip_each_parameter(optimizer, train.clip_grad, None)
        with Ledger(()) as update:
            if train.clip_grad and not train.clip_each:
                torch.nn.utils.clip_grad_norm_(trained, train.clip_grad)
            optimizer.step()
        with Ledger(()) as average:
            method.end_step(Step(0, 1, 1))
        held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return Update(
            state=sum(value.nbytes for value in held),
            temporary=update.peak,
            moved=sum(work.bytes for work in update.work),
            teacher_moved=sum(work.bytes for work in average.work),
            messages=tuple(group.messages) if group is not None else (),
        )
