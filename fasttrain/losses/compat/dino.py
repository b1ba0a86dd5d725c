"""DINO's loss with the interface of facebookresearch/dino's ``main_dino.py`` (arXiv 2104.14294)."""

from __future__ import annotations

from torch import Tensor

from ...kernels.backend import Backend
from ...kernels.checks import check_positive, check_rows
from ..dino import CenteredCrossEntropy, warmup_temperature

__all__ = ["DINOLoss"]

_TEACHER_VIEWS = 2


class DINOLoss(CenteredCrossEntropy):
    """The loss and the centre of :class:`fasttrain.losses.DINOLoss`, on views that lie one after the other, in nats.

    The teacher's temperature goes linearly from ``warmup_teacher_temp`` to ``teacher_temp`` in the first
    ``warmup_teacher_temp_epochs`` of ``nepochs`` epochs. ``center`` is a buffer [1, out_dim]; it moves after each loss
    with the mean of all ranks, and no process group is needed where there is one rank.

    Raises ValueError for a temperature that is not positive, a momentum outside of [0, 1], fewer than two crops, or a
    warm-up of more than ``nepochs`` epochs.
    """

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__((1, out_dim), student_temp, center_momentum, backend)
        check_positive(warmup_teacher_temp, "warmup_teacher_temp")
        check_positive(teacher_temp, "teacher_temp")
        if ncrops < _TEACHER_VIEWS:
            raise ValueError(f"ncrops must be at least {_TEACHER_VIEWS}, got {ncrops}")
        if not 0 <= warmup_teacher_temp_epochs <= nepochs:
            raise ValueError(
                f"warmup_teacher_temp_epochs must be from 0 to nepochs = {nepochs}, got {warmup_teacher_temp_epochs}"
            )
        self.ncrops = ncrops
        self.teacher_temp_schedule = [
            warmup_temperature(epoch, warmup_teacher_temp_epochs, warmup_teacher_temp, teacher_temp)
            for epoch in range(nepochs)
        ]

    def forward(
        self,
        student_output: Tensor,
        teacher_output: Tensor,
        epoch: int,
        *,
        student_prototypes: Tensor | None = None,
        teacher_prototypes: Tensor | None = None,
    ) -> Tensor:
        """Loss of logits [ncrops B, out_dim] of the student and [2 B, out_dim] of the teacher; a scalar.

        Both start with the two global crops. With both prototypes [out_dim, D] they are features [.., D] instead, as
        for :class:`fasttrain.losses.DINOLoss`. Raises ValueError for rows that are not ncrops and two views of one
        batch, an epoch outside of [0, nepochs), or one kind of prototypes without the other.
        """
        self._compare_batches(teacher_output)
        if not 0 <= epoch < len(self.teacher_temp_schedule):
            raise ValueError(f"epoch must be from 0 to {len(self.teacher_temp_schedule) - 1}, got {epoch}")
        return self._loss(
            _split(teacher_output, _TEACHER_VIEWS, "teacher_output"),
            _split(student_output, self.ncrops, "student_output"),
            self.teacher_temp_schedule[epoch],
            teacher_prototypes,
            student_prototypes,
        )


def _split(rows: Tensor, views: int, name: str) -> Tensor:
    check_rows(rows, name)
    if len(rows) % views:
        raise ValueError(f"{name} must be {views} views of one batch, got {len(rows)} rows")
    return rows.reshape(views, -1, rows.shape[1])
