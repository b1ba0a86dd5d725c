"""The loss over prototypes that both backends compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The loss [], the mean assignment [K], and four tensors for the backward pass. Empty if not needed."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of a loss. The rows of image b have the weight r_b: ``weight``, else 1 / B.

    - With a teacher the loss is the cross-entropy: the sum over images of r_b times the mean over pairs of views. With
      ``own`` the only view of the student learns the only view of the teacher. Otherwise every view of the student
      learns all views of the teacher but its own.
    - Without a teacher it is the mean entropy of the assignments. The mean assignment must be requested, too.
    - ``marginal`` requests the mean assignment: the sum over images of r_b times the mean over the student's views.
    """

    student: Tensor  # [S, B, D]
    teacher: Tensor | None  # [T, B, D]
    prototypes: Tensor  # [K, D]
    teacher_prototypes: Tensor | None  # [K, D]
    bias: Tensor | None  # [1 or T, K], of the teacher's scores
    weight: Tensor | None  # [B]
    student_scale: float
    teacher_scale: float
    own: bool
    marginal: bool
    need_student: bool
    need_prototypes: bool

    @property
    def rows(self) -> int:
        """The number of the student's rows, S B."""
        return self.student.shape[0] * self.student.shape[1]

    def partners(self) -> list[int]:
        """Return the number of the teacher's views that each view of the student learns."""
        views, teachers = len(self.student), 0 if self.teacher is None else len(self.teacher)
        return [1] * views if self.own or not teachers else [teachers - (view < teachers) for view in range(views)]

    def row_weights(self, images: Tensor) -> Tensor:
        """Return the weights [S b] of the rows' log-sum-exps, for :meth:`image_weights` of some images [b]."""
        return torch.cat([images * partners for partners in self.partners()])

    def mean_weights(self, dtype: torch.dtype, images: slice = slice(None)) -> Tensor:
        """Return the weights [S b] of the rows of some images in the mean assignment."""
        views, count, _ = self.student.shape
        if self.weight is None:
            return self.student.new_full((views * len(range(count)[images]),), 1 / (views * count), dtype=dtype)
        return self.weight[images].to(dtype).repeat(views) / views

    def image_weights(self, dtype: torch.dtype) -> Tensor:
        """Return r_b divided by the number of pairs [B]."""
        pairs = sum(self.partners())
        if self.weight is not None:
            return self.weight.to(dtype) / pairs
        images = self.student.shape[1]
        return self.student.new_full((images,), 1 / (pairs * images), dtype=dtype)
