"""The interface of a method: views in, loss and logged scalars out.

A method knows views and networks. It does not know ranks: it passes ``self.group`` to reductions. It does not know the
step either: the engine calls ``forward``, steps the optimizer, and calls ``end_step``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.collectives import Group
from ..losses import Bound
from ..losses.base import CrossRank
from ..models.teacher import ema_update
from ..optim.optimizers import ParameterRule, default_rule
from ..optim.schedules import cosine
from ..pipelines.views.recipe import ViewRecipe


@dataclass(frozen=True)
class Task:
    """The circumstances a method is built for."""

    entropy: bool
    """Whether the entropy-reconstruction bound replaces the method's own objective."""
    views: ViewRecipe
    images: int
    """Images of the training data."""
    batch: int
    """Images of a micro-batch over all ranks."""
    seed: int = 0
    """The run's seed, for random draws that must not depend on the number of ranks."""
    has_weights: bool = False
    """Whether the backbone starts from given weights."""


@dataclass(frozen=True)
class Step:
    """The position of the run: optimizer step ``index`` of ``total``, with ``per_epoch`` steps per epoch.

    ``measure`` requests the bound even if the objective does not need it. After the number of steps per epoch changed
    in a resumed run, the schedules are ``ahead`` of the run's own count of steps. ``micro`` is the number of the
    micro-batch in its step.
    """

    index: int
    total: int
    per_epoch: int
    measure: bool = True
    ahead: int = 0
    micro: int = 0

    @property
    def position(self) -> int:
        """The index in the schedules, of which ``total`` is the end."""
        return self.index + self.ahead

    @property
    def epoch(self) -> float:
        """Finished epochs, including the fraction of the current one."""
        return self.position / self.per_epoch


class Objective(NamedTuple):
    """The result of a forward pass.

    It is a tuple because DeepSpeed searches only tuples for the tensors that it hooks before backward.
    """

    loss: Tensor
    """The scalar to minimise."""
    bound: Bound | None = None
    """The entropy-reconstruction bound, if it was measured and the method has one."""
    projections: Tensor | None = None
    """The rows [N, D], without gradient, in which a collapse shows first; None leaves out those monitors."""
    logs: Mapping[str, Tensor] = MappingProxyType({})
    """Further scalars by name, without gradient. They are averaged over ranks and micro-batches and logged."""


@dataclass(frozen=True)
class PerImages:
    """A setting that small data needs smaller: one unit per ``images`` images, a power of two in a range."""

    images: int
    least: int
    most: int

    def value(self, count: int) -> int:
        """Return the setting for ``count`` images."""
        return min(max(power_of_two_below(count / self.images), self.least), self.most)


def power_of_two_below(number: float) -> int:
    """Return the largest power of two that is at most ``number``, and at least 1."""
    return 1 << max(math.floor(math.log2(max(number, 1))), 0)


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method without any."""


def checked(objective: object, method: nn.Module) -> Objective:
    """Return what ``forward`` of a method returned. Raise ConfigError if the trainer cannot use it."""
    forward = f"{type(method).__name__}.forward"
    if not isinstance(objective, Objective):
        raise ConfigError(f"{forward}: must return an Objective, got {type(objective).__name__}.")
    loss = objective.loss
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        raise ConfigError(f"{forward}: Objective.loss must be a scalar tensor with a gradient.")
    for name, value in objective.logs.items():
        if not (isinstance(value, Tensor) and value.numel() == 1):
            raise ConfigError(f"{forward}: Objective.logs[{name!r}] must be a tensor with one element.")
    return objective


class Method(nn.Module):
    """One paper. A subclass sets ``Settings``, builds ``student`` (and ``teacher``), and defines ``forward``.

    Everything that a run must not forget is a parameter or a buffer. Settings of a method with a teacher have
    ``momentum_teacher`` and ``momentum_teacher_end``.
    """

    Settings: ClassVar[type[Any]] = NoSettings
    """Frozen dataclass of the method's own settings (:func:`fasttrain.flags.flag`), with the paper's values."""
    family: ClassVar[str | None] = None
    """"contrastive", "clustering", "distillation" or "regularised": selects the explanation in the report."""
    space: ClassVar[str | None] = None
    """The space of the bound, "sphere" or "prototypes"; None for a method without a bound and so without a twin."""
    has_teacher: ClassVar[bool] = False
    """Whether ``teacher`` follows the student and is evaluated and exported."""
    recipes: ClassVar[str | None] = None
    """A built-in method whose recipes (views, schedule) this one uses; None for a method with recipes of its own."""
    sized: ClassVar[Mapping[str, PerImages]] = MappingProxyType({})
    """Settings, such as the number of prototypes, that recipes for one's own photographs derive from the data."""
    global_views_needed: int = 2
    """The smallest number of global views that the method works with."""
    synchronised_batch_norm: ClassVar[bool] = True
    """Whether BatchNorm sees the batch of all ranks. MoCo's must not: it would distinguish keys from the queue."""
    zero_init_residual: ClassVar[bool] = True
    """Whether to zero-initialise the last BatchNorm gamma of each residual block, as the paper's code does."""
    constant_lr_modules: frozenset[str] = frozenset()
    """Names of modules whose learning rate does not decay."""
    needs_patches: ClassVar[bool] = False
    """Whether the backbone must be a ViT, whose patch tokens the method uses."""
    image_memories: Mapping[str, int] = MappingProxyType({})
    """Buffers with one row per image, and the dimension of the images. A step writes only the rows of its batch."""

    student: Any
    """The :class:`Branch` that is trained, or the method's equivalent with a ``backbone``."""
    teacher: Any
    """The branch that follows the student, or None."""

    def __init__(self, settings: Any, task: Task) -> None:
        super().__init__()
        self.teacher = None
        if task.views.n_global < self.global_views_needed:
            raise ValueError(
                f"--recipe: the method needs {self.global_views_needed} global views, got {task.views.n_global}. "
                "Choose a recipe with more views."
            )
        self.check(settings, task.batch)
        self.settings = settings
        self.entropy = task.entropy
        self.n_global, self.n_views = task.views.n_global, task.views.n_views
        self._group: Group | None = None

    @classmethod
    def encoder_channels(cls, views: ViewRecipe) -> tuple[int, ...]:
        """Return the input channels of each of the backbone's encoders. All methods but CMC have one encoder."""
        return (views.channels,)

    @classmethod
    def check(cls, settings: Any, batch: int) -> None:
        """Raise ValueError if the settings cannot be trained with ``batch`` images per micro-batch over all ranks."""

    @classmethod
    def bytes_between_epochs(cls, settings: Any, images: int) -> int:
        """Return the bytes that :meth:`start_epoch` needs temporarily, for ``fasttrain plan``."""
        return 0

    @abstractmethod
    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the objective of a batch.

        ``views`` are grouped by resolution, global ones first, each group [V_g, B, C, H, W]; ``indices`` [B] are the
        numbers of the images.
        """

    def objective(self, step: Step, loss: Callable[[], Tensor], twin: Callable[[], Objective]) -> Objective:
        """Return the twin's objective, or the method's own ``loss`` with the twin's bound if it is to be measured."""
        if self.entropy:
            return twin()
        own = loss()
        if not step.measure:
            return Objective(own)
        with torch.no_grad():
            return twin()._replace(loss=own)

    @property
    def group(self) -> Group | None:
        """The process group that reductions cross, or None for one rank. Setting it also sets it in the losses.

        The losses then no longer compare the ranks' batches, which the loader makes equal. So the host need not wait.
        """
        return self._group

    @group.setter
    def group(self, group: Group | None) -> None:
        self._group = group
        for module in self.modules():
            if isinstance(module, CrossRank):
                module.process_group = group
                module.check_batches = False

    @property
    def batch_divisor(self) -> int:
        """The number that must divide a rank's batch, because BatchNorm sees its parts separately."""
        return 1

    def warnings_for(self, images: int, batch: int) -> list[str]:
        """Return warnings for settings that are valid but probably not intended.

        ``batch`` is the number of images, over all ranks, that see each other.
        """
        return []

    @property
    def needs_first_pass(self) -> bool:
        """Whether :meth:`first_pass` must see every image before the first step."""
        return False

    def first_pass(self, views: Sequence[Tensor], indices: Tensor) -> None:
        """See a batch before training starts, without gradient."""

    def start_epoch(self) -> None:
        """Prepare an epoch. The engine calls it with torch's generator in the same state on all ranks."""

    def end_step(self, step: Step) -> None:
        """Update the teacher after the optimizer's step."""
        momentum = self.momentum(step)
        if self.teacher is not None and momentum is not None:
            ema_update(self.teacher, self.student, momentum)

    def momentum(self, step: Step) -> float | None:
        """Return the teacher's momentum at a step, a cosine from start to end; None without a teacher."""
        if self.teacher is None:
            return None
        return cosine(step.position, step.total, self.settings.momentum_teacher, self.settings.momentum_teacher_end)

    @property
    def frozen_prototype_epochs(self) -> float:
        """The number of epochs during which the prototypes' learning rate is 0."""
        return 0

    def parameter_rule(self, name: str, parameter: nn.Parameter, *, decay_all: bool = False) -> ParameterRule:
        """Return how the optimizer treats a trained parameter. Override it to set rules of a method's own.

        ``decay_all`` is the flag of that name. The default treats biases, norms, prototypes and
        ``constant_lr_modules`` as :func:`fasttrain.optim.optimizers.default_rule` describes.
        """
        return default_rule(
            name,
            parameter,
            decay_all=decay_all,
            constant_lr=self.constant_lr_modules,
            frozen_prototype_epochs=self.frozen_prototype_epochs,
        )

    @property
    def backbones(self) -> list[nn.Module]:
        """All copies of the backbone. They start from the same weights."""
        return [branch.backbone for branch in (self.student, self.teacher) if branch is not None]

    @property
    def backbone(self) -> nn.Module:
        """The network whose features are evaluated and exported: the teacher's if there is one."""
        branch = self.student if self.teacher is None else self.teacher
        backbone: nn.Module = branch.backbone
        return backbone


def check_queue(length: int, batch: int) -> None:
    """Raise ValueError unless a queue holds a whole number of batches of all ranks."""
    if length % batch:
        raise ValueError(
            f"--queue_length: must be a multiple of the batch of all ranks ({batch}), got {length}. "
            f"Use {max(length // batch, 1) * batch}."
        )
