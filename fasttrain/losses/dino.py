"""Self-distillation with a centred teacher (DINO, arXiv 2104.14294), with lightly 1.6's interface."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import prototype_terms
from ..kernels.backend import Backend
from ..kernels.checks import check_positive, check_rows
from ..kernels.collectives import mean_over_ranks
from ..kernels.precision import at_least_single
from .base import CrossRank
from .views import count_pairs, cross_entropy_of_others, stack_views


def warmup_temperature(epoch: int, warmup_epochs: float, start: float, end: float) -> float:
    """Return the teacher's temperature in an epoch of a linear warm-up.

    The W = ``warmup_epochs`` values go from ``start`` in epoch 0 to ``end`` in epoch W - 1 (``numpy.linspace`` in
    facebookresearch/dino). Later epochs, and all epochs without warm-up, have ``end``.
    """
    if epoch == 0 and warmup_epochs > 0:
        return start
    steps = warmup_epochs - 1
    return end if epoch >= steps else start + (end - start) * epoch / steps


class MovingCenter(CrossRank):
    """The student's temperature and the moving centre of the teacher's logits, for losses over prototypes.

    ``center`` is a buffer of ``center_shape``, whose last dimension is K; None turns centring off. Raise ValueError for
    a student temperature that is not positive or a momentum outside [0, 1].
    """

    center: Tensor | None

    def __init__(
        self, center_shape: Sequence[int] | None, student_temp: float, center_momentum: float, backend: Backend
    ) -> None:
        super().__init__(gather_distributed=dist.is_available())
        check_positive(student_temp, "student_temp")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum must be in [0, 1], got {center_momentum}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.backend = backend
        self.register_buffer("center", None if center_shape is None else torch.zeros(*center_shape))

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor, *, teacher_prototypes: Tensor | None = None) -> None:
        """Move the centre towards the mean over views, images and ranks of the teacher's logits [..., K].

        With ``teacher_prototypes`` [K, D] the argument is features [..., D]. Their mean logit is the prototypes times
        their mean, so no logits are computed.
        """
        if self.center is not None:
            self._compare_batches(teacher_out)
            self._move_center(self.center, teacher_out, teacher_prototypes)

    @torch.no_grad()
    def _move_center(self, center: Tensor, teacher_out: Tensor, teacher_prototypes: Tensor | None) -> None:
        dtype = torch.promote_types(teacher_out.dtype, torch.float32)
        mean = teacher_out.mean(tuple(range(teacher_out.ndim - 1)), dtype=dtype)
        mean = mean_over_ranks(mean, self.group)
        if teacher_prototypes is not None:
            with torch.autocast(mean.device.type, enabled=False):  # a product in bf16 would not reach the centre
                mean = teacher_prototypes.to(dtype) @ mean
        center.lerp_(mean.view_as(center).to(center), 1 - self.center_momentum)

    def _center(self, other: Tensor | None) -> Tensor | None:
        """Return another centre [K], or else the moving one, if there is one."""
        return other if other is not None or self.center is None else self.center.flatten()

    def _check_prototypes(self, teacher: Tensor | None, student: Tensor | None, dim: int) -> None:
        if (teacher is None) != (student is None):
            raise ValueError("give both teacher_prototypes and student_prototypes, or neither")
        count = None if self.center is None else self.center.numel()
        if teacher is None and count not in (None, dim):
            raise ValueError(
                f"logits must have the centre's K = {count}, got {dim}; if these are features, give both prototypes too"
            )
        for prototypes, name in ((teacher, "teacher_prototypes"), (student, "student_prototypes")):
            if prototypes is None:
                continue
            check_rows(prototypes, name)
            expected = (len(prototypes) if count is None else count, dim)
            if prototypes.shape != expected:
                raise ValueError(f"{name} must be [K, D] = {expected}, got {tuple(prototypes.shape)}")


class CenteredCrossEntropy(MovingCenter):
    """DINO's loss for one teacher temperature; the base of its two interfaces."""

    def terms(
        self,
        student: Tensor,
        teacher: Tensor,
        student_prototypes: Tensor,
        teacher_prototypes: Tensor,
        *,
        teacher_temp: float,
        center: Tensor | None = None,
        entropy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and, with ``entropy``, H(mean student assignment) of all views and ranks, in nats.

        Features [S, B, D] and [T, B, D] with prototypes [K, D] each, as for
        :func:`fasttrain.kernels.prototype_terms`. ``center`` [K] replaces the moving centre, as the potentials of
        Sinkhorn do. The moving centre does not move: call :meth:`update_center` afterwards.
        """
        if entropy:
            self._compare_batches(student)
        return prototype_terms(
            student,
            teacher.detach(),
            student_prototypes,
            teacher_prototypes,
            student_temp=self.student_temp,
            teacher_temp=teacher_temp,
            center=self._center(center),
            entropy=entropy,
            backend=self.backend,
            group=self.group,
            check_batches=False,
        )

    def _loss(
        self,
        teacher: Tensor,
        student: Tensor,
        teacher_temp: float,
        teacher_prototypes: Tensor | None,
        student_prototypes: Tensor | None,
    ) -> Tensor:
        """Return the loss of [T, B, K] and [S, B, K], or of [.., B, D] with prototypes; then move the centre."""
        check_positive(teacher_temp, "teacher_temp")
        count_pairs(teacher, student, "the teacher", "the student")
        self._check_prototypes(teacher_prototypes, student_prototypes, teacher.shape[2])
        teacher = teacher.detach()
        if teacher_prototypes is None or student_prototypes is None:
            with torch.no_grad():
                logits = at_least_single(teacher)
                if self.center is not None:
                    logits = logits - self.center.flatten()
                targets = (logits / teacher_temp).softmax(-1)
            loss = cross_entropy_of_others(targets, student, temp=self.student_temp)
        else:
            loss, _ = self.terms(
                student, teacher, student_prototypes, teacher_prototypes, teacher_temp=teacher_temp, entropy=False
            )
        if self.center is not None:
            self._move_center(self.center, teacher, teacher_prototypes)
        return loss


class DINOLoss(CenteredCrossEntropy):
    """Cross-entropy of every student view with every *other* teacher view (arXiv 2104.14294, eq. 1 to 4), in nats.

        p_t = softmax((teacher_t - center) / teacher_temp)               no gradient
        loss = mean over t, s != t and B of  -sum_k p_t,k log softmax(student_s / student_temp)_k
        center <- center_momentum center + (1 - center_momentum) mean over views and images of teacher_t

    The centre, a buffer [1, 1, output_dim], moves after each loss, with or without gradient. If a process group is
    started, its mean is over all ranks. ``center_mode="none"`` leaves the centre out.

    The teacher's temperature is ``forward``'s argument, if given. Else, with ``epoch``, it follows a linear warm-up of
    ``warmup_teacher_temp_epochs`` epochs from ``warmup_teacher_temp``. Else it is ``teacher_temp``.

    Drop-in for ``lightly.loss.DINOLoss``, including the argument order (facebookresearch/dino's is in
    ``compat.dino``). Differences: the teacher never gets a gradient, as in the paper, and the result and all sums are
    at least fp32.

    Raise ValueError for a temperature that is not positive, a momentum outside [0, 1], or an unknown ``center_mode``.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: float = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        backend: Backend = "auto",
    ) -> None:
        if center_mode not in ("mean", "none"):
            raise ValueError(f"Unknown mode {center_mode!r}. Valid modes are ['mean', 'none'].")
        shape = None if center_mode == "none" else (1, 1, output_dim)
        super().__init__(shape, student_temp, center_momentum, backend)
        check_positive(warmup_teacher_temp, "warmup_teacher_temp")
        check_positive(teacher_temp, "teacher_temp")
        self.warmup_teacher_temp = warmup_teacher_temp
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs

    @property
    def teacher_temp_schedule(self) -> Tensor:
        """The temperatures of the warm-up's epochs, fp64 on the CPU, as lightly has them."""
        epochs = range(math.ceil(self.warmup_teacher_temp_epochs))
        return torch.tensor([self.teacher_temp_at(epoch) for epoch in epochs], dtype=torch.float64, device="cpu")

    def teacher_temp_at(self, epoch: int) -> float:
        """Return the teacher's temperature in an epoch."""
        return warmup_temperature(epoch, self.warmup_teacher_temp_epochs, self.warmup_teacher_temp, self.teacher_temp)

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
        *,
        teacher_prototypes: Tensor | None = None,
        student_prototypes: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the teacher's and the student's views, each a tensor of logits [B, output_dim].

        It is a scalar. View t of the teacher and view t of the student are the same view of the image.

        With both prototypes [output_dim, D], the weights of the last linear layers (no bias), the views are that
        layer's inputs [B, D] instead. Loss, gradients and centre are the same, and no logits are computed: memory is
        O(views B D + output_dim D).

        Raise ValueError for fewer than two views, views that differ in shape, dtype or device, a temperature that is
        not positive, or one kind of prototypes without the other.
        """
        if self.center is not None:
            self._compare_batches(*teacher_out[:1])
        if teacher_temp is None:
            teacher_temp = self.teacher_temp if epoch is None else self.teacher_temp_at(epoch)
        return self._loss(
            stack_views(teacher_out, "teacher_out"),
            stack_views(student_out, "student_out"),
            float(teacher_temp),
            teacher_prototypes,
            student_prototypes,
        )
