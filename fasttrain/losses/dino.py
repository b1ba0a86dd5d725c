"""Self-distillation with a centred teacher (DINO, arXiv 2104.14294), with lightly 1.6's interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels import prototype_cross_entropy
from ..kernels.backend import Backend
from ..kernels.checks import check_positive, check_rows
from ..kernels.collectives import mean_over_ranks
from ..kernels.precision import at_least_single
from .base import default_group
from .views import count_pairs, cross_entropy_of_others, stack_views


class CenteredCrossEntropy(nn.Module):
    """DINO's loss for one teacher temperature, and the centre that moves with it; what its two interfaces share.

    ``center`` is a buffer of ``center_shape``, whose last number is K. Raises ValueError for a student temperature
    that is not positive or a momentum outside of [0, 1].
    """

    center: Tensor

    def __init__(
        self, center_shape: Sequence[int], student_temp: float, center_momentum: float, backend: Backend
    ) -> None:
        super().__init__()
        check_positive(student_temp, "student_temp")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum must be in [0, 1], got {center_momentum}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.backend = backend
        self.register_buffer("center", torch.zeros(*center_shape))

    def _loss(
        self,
        teacher: Tensor,
        student: Tensor,
        teacher_temp: float,
        teacher_prototypes: Tensor | None,
        student_prototypes: Tensor | None,
    ) -> Tensor:
        """Loss of [T, B, K] and [S, B, K], or of [T, B, D] and [S, B, D] with prototypes; then the centre moves."""
        check_positive(teacher_temp, "teacher_temp")
        count_pairs(teacher, student, "the teacher", "the student")
        self._check_prototypes(teacher_prototypes, student_prototypes, teacher.shape[2])
        teacher = teacher.detach()
        if teacher_prototypes is None or student_prototypes is None:
            with torch.no_grad():
                targets = ((at_least_single(teacher) - self.center.flatten()) / teacher_temp).softmax(-1)
            loss = cross_entropy_of_others(targets, student, temp=self.student_temp)
        else:
            loss = prototype_cross_entropy(
                student,
                teacher,
                student_prototypes,
                teacher_prototypes,
                student_temp=self.student_temp,
                teacher_temp=teacher_temp,
                center=self.center.flatten(),
                backend=self.backend,
            )
        self.update_center(teacher, teacher_prototypes=teacher_prototypes)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor, *, teacher_prototypes: Tensor | None = None) -> None:
        """Move the centre towards the mean over views, images and ranks of the teacher's logits [..., K].

        With ``teacher_prototypes`` [K, D] of features [..., D]: their mean logit is the prototypes times their mean.
        """
        kind = torch.promote_types(teacher_out.dtype, torch.float32)
        mean = teacher_out.flatten(0, -2).mean(0, dtype=kind)
        mean = mean_over_ranks(mean, default_group(dist.is_available()))
        if teacher_prototypes is not None:
            with torch.autocast(mean.device.type, enabled=False):
                mean = teacher_prototypes.to(kind) @ mean
        self.center.mul_(self.center_momentum)
        self.center.add_(mean.view_as(self.center).to(self.center), alpha=1 - self.center_momentum)

    def _check_prototypes(self, teacher: Tensor | None, student: Tensor | None, dim: int) -> None:
        count = self.center.numel()
        if (teacher is None) != (student is None):
            raise ValueError("give both teacher_prototypes and student_prototypes, or neither")
        if teacher is None and dim != count:
            raise ValueError(
                f"logits must have the centre's K = {count}, got {dim}; if these are features, give both prototypes too"
            )
        for prototypes, name in ((teacher, "teacher_prototypes"), (student, "student_prototypes")):
            if prototypes is None:
                continue
            check_rows(prototypes, name)
            if prototypes.shape != (count, dim):
                raise ValueError(f"{name} must be [K, D] = {(count, dim)}, got {tuple(prototypes.shape)}")


class DINOLoss(CenteredCrossEntropy):
    """Cross-entropy of every student view with every *other* teacher view (arXiv 2104.14294, eq. 1 to 4), in nats.

        p_t = softmax((teacher_t - center) / teacher_temp)               no gradient
        loss = mean over t, s != t and B of  -sum_k p_t,k log softmax(student_s / student_temp)_k
        center <- center_momentum center + (1 - center_momentum) mean over views and images of teacher_t

    The centre, a buffer [1, 1, output_dim], moves after each loss, with gradient or without; its mean is that of all
    ranks wherever a process group is started. The teacher's temperature is, in this order, what ``forward`` is given;
    with ``epoch`` that of a linear warm-up of ``warmup_teacher_temp_epochs`` epochs from ``warmup_teacher_temp``;
    ``teacher_temp``.

    Drop-in for ``lightly.loss.DINOLoss``, argument order included (facebookresearch/dino's is in ``compat.dino``). What
    differs: the teacher never gets a gradient, as in the paper, and the result and all sums are at least fp32.

    Raises ValueError for a temperature that is not positive, a momentum outside of [0, 1], or a ``center_mode`` other
    than "mean".
    """

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__((1, 1, output_dim), student_temp, center_momentum, backend)
        check_positive(warmup_teacher_temp, "warmup_teacher_temp")
        check_positive(teacher_temp, "teacher_temp")
        if center_mode != "mean":
            raise ValueError(f"Unknown mode {center_mode!r}. Valid modes are ['mean'].")
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, dtype=torch.float64, device="cpu"
        )

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
        """Loss of the teacher's and the student's views, each a tensor of logits [B, output_dim]; a scalar.

        View t of the teacher and view t of the student are the same view. With both prototypes [output_dim, D], those
        of the last linear layers (no bias), the views are that layer's inputs [B, D] instead. Loss, gradients and
        centre are the same, and no logits are formed: memory is O(views B D + output_dim D).

        Raises ValueError for fewer than two views, views that differ in shape, type or device, a temperature that is
        not positive, or one kind of prototypes without the other.
        """
        return self._loss(
            stack_views(teacher_out, "teacher_out"),
            stack_views(student_out, "student_out"),
            self._teacher_temp(teacher_temp, epoch),
            teacher_prototypes,
            student_prototypes,
        )

    def _teacher_temp(self, given: float | None, epoch: int | None) -> float:
        if given is not None:
            return float(given)
        if epoch is not None and epoch < self.warmup_teacher_temp_epochs:
            return self.teacher_temp_schedule[epoch].item()
        return self.teacher_temp
