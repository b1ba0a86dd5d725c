"""What methods share whose loss aligns the views of an image and regularises the statistics of the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..kernels.normalize import normalize_rows
from .base import Method, Objective, Step


class RegularisedMethod(Method):
    """A method without negatives, prototypes or a teacher: a regulariser of the batch prevents the collapse.

    The projections are not of unit norm, and the regulariser is no entropy in nats. So there is no bound yet. The
    method logs its own terms.
    """

    family: ClassVar[str | None] = "regularised"

    @classmethod
    def check(cls, settings: Any, batch: int) -> None:
        """Raise ValueError if the batch has no second row."""
        if batch < 2:
            raise ValueError(
                "--batch_size_per_gpu: the statistics of a batch need at least 2 images, got 1. Use a larger batch."
            )

    def view_pairs(self, views: int) -> list[tuple[int, int]]:
        """Return all pairs of ``views`` views with at least one global view."""
        return [(i, j) for i in range(self.n_global) for j in range(i + 1, views)]

    def regularised_objective(
        self, loss: Tensor, terms: Mapping[str, Tensor], projections: Tensor, step: Step
    ) -> Objective:
        """Return the objective of a loss and its terms, which are logged. Projections are [V, B, D] of any norm."""
        logs = {name: term.detach() for name, term in terms.items()}
        rows = normalize_rows(projections.detach()).flatten(0, 1) if step.measure else None
        return Objective(loss, None, rows, logs)
