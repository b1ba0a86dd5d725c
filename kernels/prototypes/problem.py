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

    def row_weights(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [S, B] of the rows' log-sum-exps: r_b times the views to learn, divided by the pairs."""
        views, images, _ = self.student.shape
        partners = 1 if self.own or self.teacher is None else len(self.teacher)
        weights = self.student.new_full((views, images), partners * self._share(), dtype=dtype)
        if self.teacher is not None and not self.own:
            weights[: len(self.teacher)] -= self._share()
        return weights if self.weight is None else weights * self.weight

    def weighted(self, rows: Tensor) -> Tensor:
        """Return rows [V, B, D] times r_b, divided by the number of pairs."""
        return rows * (self._share() if self.weight is None else (self._share() * self.weight)[:, None])

    def mean_weights(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [S, B] of the rows in the mean assignment."""
        views, images, _ = self.student.shape
        if self.weight is None:
            return self.student.new_full((views, images), 1 / (views * images), dtype=dtype)
        return (self.weight.to(dtype) / views).expand(views, -1)

    def _share(self) -> float:
        views, images, _ = self.student.shape
        teachers = 0 if self.teacher is None else len(self.teacher)
        pairs = views if self.own or not teachers else views * teachers - min(views, teachers)
        return 1 / (pairs * (images if self.weight is None else 1))
