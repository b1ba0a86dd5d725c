"""SimDINO (arXiv 2502.10385): cosine to the teacher, and the coding rate in place of prototypes and centring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.checks import check_positive
from ..kernels.coding_rate import coding_rate
from ..kernels.collectives import ranks_of
from .base import CrossRank, other_pairs, unit_views
from .views import count_pairs, stack_views


class SimDINOLoss(CrossRank):
    """Minus the mean cosine of every student view with every *other* teacher view, minus the coding rate.

        loss = -coeff mean over t, s != t and B of cos(teacher_t, student_s)  -  gamma mean over t of R(z_t)
        R(z) = 1/2 log det(I + D / (N eps) z^T z)         (:func:`fasttrain.kernels.coding_rate`, nats)
        gamma = (D + N) / (D N)

    The rows have unit norm. z_t is the student's view t, a global one, or with ``smooth`` the mean of the student's and
    the teacher's. N is the number of rows, of all ranks if ``gather_distributed`` and a process group is started. The
    teacher gets no gradient. The official code calls ``smooth`` expa_type and the gathering reduce_cov; without the
    latter it multiplies N by the number of ranks anyway, which this loss does not do.

    Raise ValueError for an ``eps`` that is not positive.
    """

    def __init__(
        self, coeff: float = 1.0, eps: float = 0.05, *, smooth: bool = True, gather_distributed: bool = False
    ) -> None:
        super().__init__(gather_distributed)
        check_positive(eps, "eps")
        self.coeff, self.eps, self.smooth = coeff, eps, smooth

    def forward(self, teacher_out: Sequence[Tensor], student_out: Sequence[Tensor]) -> Tensor:
        """Return the loss of the teacher's and the student's views, each [B, D] and of any norm; a scalar.

        View t of the teacher and view t of the student are the same view of the image. Raise ValueError for fewer than
        two views, more views of the teacher than of the student, or views that differ in shape, dtype or device.
        """
        self._compare_batches(*student_out[:1])  # before a rank refuses its own batch
        teacher, student = stack_views(teacher_out, "teacher_out"), stack_views(student_out, "student_out")
        count_pairs(teacher, student, "the teacher", "the student")
        cosine, spread = self._terms(unit_views(teacher.detach(), "teacher_out"), unit_views(student, "student_out"))
        return self.weighted(cosine, spread)

    def weighted(self, cosine: Tensor, spread: Tensor) -> Tensor:
        """Return the loss of its terms."""
        return -self.coeff * cosine - spread

    def terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cosine and gamma R of views with unit norm, [T, B, D] and [S, B, D] with T at most S."""
        self._compare_batches(student)
        return self._terms(teacher, student)

    def _terms(self, teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
        if len(teacher) > len(student):
            raise ValueError(f"the teacher has {len(teacher)} views, the student only {len(student)}")
        cosine = torch.stack([(s * t).sum(1).mean() for s, t in other_pairs(student, teacher)]).mean()
        z = student[: len(teacher)]
        z = (z + teacher) / 2 if self.smooth else z
        rows, dim = z.shape[1] * ranks_of(self.group), z.shape[2]
        rate = coding_rate(z, eps=self.eps, group=self.group, check_batches=False).mean()
        return cosine, rate * ((dim + rows) / (dim * rows))
