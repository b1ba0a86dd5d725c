"""Self-distillation of masked patches (iBOT, arXiv 2111.07832; DINOv2), with lightly 1.6's interface."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import patch_cross_entropy
from ..kernels.backend import Backend
from ..kernels.checks import check_pair, check_positive
from ..kernels.collectives import mean_over_ranks
from ..kernels.precision import at_least_single
from .dino import MovingCenter


class iBOTPatchLoss(MovingCenter):  # noqa: N801 - the name in facebookresearch/dinov2
    """Cross-entropy of every masked patch of the student with the teacher's patch at its place, in nats.

        p_i = softmax((teacher_i - center) / teacher_temp)               no gradient
        loss = mean over images, and the masked patches of each, of  -sum_k p_i,k log P_i,k
        P_i = softmax(student_i / student_temp)
        center <- center_momentum center + (1 - center_momentum) mean over rows of teacher_i

    (arXiv 2111.07832, eq. 2.) An image without masked patches counts as 0. The centre, a buffer [1, output_dim], moves
    after each loss, with or without gradient. If a process group is started, its mean is over the rows of all ranks.
    ``center_mode="none"`` leaves the centre out.

    Drop-in for ``lightly.loss.IBOTPatchLoss``, including the argument order. Differences: the teacher never gets a
    gradient, the result and all sums are at least fp32, and ranks with more masked patches have more weight in the
    centre.

    Raise ValueError for a temperature that is not positive, a momentum outside [0, 1], or an unknown ``center_mode``.
    """

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        *,
        backend: Backend = "auto",
    ) -> None:
        if center_mode not in ("mean", "none"):
            raise ValueError(f"Unknown mode {center_mode!r}. Valid modes are ['mean', 'none'].")
        shape = None if center_mode == "none" else (1, output_dim)
        super().__init__(shape, student_temp, center_momentum, backend)
        check_positive(teacher_temp, "teacher_temp")
        self.teacher_temp = teacher_temp

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
        *,
        teacher_prototypes: Tensor | None = None,
        student_prototypes: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the masked patches' logits [M, output_dim]; a scalar.

        ``mask`` [B, H, W] bool has M true entries, in the order of the rows.

        With both prototypes [output_dim, D], the weights of the last linear layers (no bias), the rows are that
        layer's inputs [M, D] instead. Loss, gradients and centre are the same, and no logits are computed: memory is
        O(M D + output_dim D).

        Raise ValueError for rows that differ in shape, dtype or device, a mask of another number of patches, a
        temperature that is not positive, or one kind of prototypes without the other. On a GPU the number of masked
        patches is not compared, because that would wait for the device.
        """
        temp = self.teacher_temp if teacher_temp is None else float(teacher_temp)
        check_positive(temp, "teacher_temp")
        check_pair(student_out, teacher_out, "student_out", "teacher_out", same_rows=True, least_rows=0)
        self._check_prototypes(teacher_prototypes, student_prototypes, teacher_out.shape[1])
        weight = _weights(mask, len(student_out))
        teacher = teacher_out.detach()
        if teacher_prototypes is None or student_prototypes is None:
            logits = at_least_single(teacher)
            if self.center is not None:
                logits = logits - self.center
            predictions = (at_least_single(student_out) / self.student_temp).log_softmax(-1)
            rows = -((logits / temp).softmax(-1) * predictions).sum(-1)
            loss = (weight.to(rows.dtype) * rows).sum()
        else:
            loss = self.weighted_sum(
                student_out, teacher, student_prototypes, teacher_prototypes, weight=weight, teacher_temp=temp
            )
        self.update_center(teacher, teacher_prototypes=teacher_prototypes)
        return loss

    def weighted_sum(
        self,
        student: Tensor,
        teacher: Tensor,
        student_prototypes: Tensor,
        teacher_prototypes: Tensor,
        *,
        weight: Tensor,
        teacher_temp: float,
        center: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of ``weight`` [M] times the cross-entropy of rows [M, D], with prototypes [K, D] each.

        ``center`` [K] replaces the moving centre, as the potentials of Sinkhorn do. The moving centre does not move:
        call :meth:`update_center` afterwards.
        """
        mean = patch_cross_entropy(
            student,
            teacher.detach(),
            student_prototypes,
            teacher_prototypes,
            student_temp=self.student_temp,
            teacher_temp=teacher_temp,
            center=self._center(center),
            weight=weight,
            backend=self.backend,
        )
        return mean * weight.sum().to(mean.dtype)

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor, *, teacher_prototypes: Tensor | None = None) -> None:
        """Move the centre towards the mean over the rows of all ranks of the teacher's logits [M, K].

        The ranks may have different numbers of rows. Without any row the centre does not move. With
        ``teacher_prototypes`` [K, D] the argument is features [M, D].
        """
        if self.center is None:
            return
        sums = at_least_single(teacher_out).sum(0)
        sums = mean_over_ranks(torch.cat([sums, sums.new_full((1,), len(teacher_out))]), self.group)
        mean = sums[:-1] / sums[-1].clamp_min(torch.finfo(sums.dtype).tiny)
        if teacher_prototypes is not None:
            with torch.autocast(mean.device.type, enabled=False):  # a product in bf16 would not reach the centre
                mean = teacher_prototypes.to(mean.dtype) @ mean
        moved = self.center.lerp(mean.view_as(self.center).to(self.center), 1 - self.center_momentum)
        self.center.copy_(torch.where(sums[-1] > 0, moved, self.center))


def _weights(mask: Tensor, rows: int) -> Tensor:
    """Return 1 / (masked patches of the image) / B for every masked patch, [rows]. The device is not waited for."""
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(f"mask must be bool [B, H, W], got {mask.dtype} {tuple(mask.shape)}")
    counts = mask.flatten(1).sum(1)
    if mask.device.type == "cpu" and int(counts.sum()) != rows:
        raise ValueError(f"mask must have one true entry per row, {rows}, got {int(counts.sum())}")
    return (1 / (counts.clamp_min(1).double() * len(mask))).repeat_interleave(counts, output_size=rows)
