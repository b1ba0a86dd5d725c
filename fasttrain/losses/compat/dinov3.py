"""Losses with the interfaces of facebookresearch/dinov3 (arXiv 2508.10104), with logits or without; see ``dinov2``."""

from __future__ import annotations

from torch import Tensor

from ..gram import GramLoss
from ..koleo import KoLeoLoss
from . import dinov2
from .dinov2 import LastLayer, Targets, without_logits

__all__ = ["DINOLoss", "GramLoss", "KoLeoLoss", "LastLayer", "Targets", "iBOTPatchLoss", "without_logits"]


class iBOTPatchLoss(dinov2.iBOTPatchLoss):  # noqa: N801 - the name in facebookresearch/dinov3
    """DINOv2's patch loss with ``init_weights``; DINOv3's code calls it before the first use."""

    def init_weights(self) -> None:
        """Set the centre to 0, where it starts."""
        assert self.center is not None
        self.center.zero_()


class DINOLoss(dinov2.DINOLoss):
    """Cross-entropy of [CLS] assignments, in nats, with the interface of ``dinov3.loss.DINOLoss``.

    It is DINOv2's but for :meth:`forward`, which returns a mean. DINOv3's code calls ``init_weights`` before the first
    use; here the centre is 0 from the start.
    """

    def init_weights(self) -> None:
        """Set the centre to 0."""
        assert self.center is not None
        self.center.zero_()

    def forward(  # type: ignore[override]
        self,
        student_logits: Tensor,
        teacher_probs: Tensor | Targets,
        ignore_diagonal: bool = False,
        *,
        student_prototypes: Tensor | None = None,
    ) -> Tensor:
        """Return the mean over all pairs of views [S, B, K] and [T, B, K], without s = t if ``ignore_diagonal``.

        With Targets and ``student_prototypes`` [K, D] the student's views are features [S, B, D].
        """
        total = dinov2.sum_of_pairs(
            student_logits,
            teacher_probs,
            self._prototypes(student_prototypes, teacher=False),
            self.student_temp,
            self.backend,
            same_view=not ignore_diagonal,
        )
        pairs = len(student_logits) * len(teacher_probs)
        return total / (pairs - min(len(student_logits), len(teacher_probs)) * ignore_diagonal)
