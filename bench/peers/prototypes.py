"""Operations with prototypes: DINO's loss from features and prototypes, with and without entropy, and Sinkhorn.

lightly's loss takes logits, so the product of the last layer counts as part of it. A benchmark covers everything from
unit features and prototypes to the loss, with the gradients of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.kernels import prototype_terms, sinkhorn
from fasttrain.kernels.prototypes import reference

from . import OURS, Case, Loss, Operation
from .libraries import compiled

_VIEWS, _TEACHERS, _TEMPS = 10, 2, {"student_temp": 0.1, "teacher_temp": 0.04}


def features_and_prototypes(case: Case, generator: torch.Generator, views: int = _VIEWS) -> tuple[Tensor, ...]:
    """Return student [views, B, D], teacher [2, B, D], both prototypes [K, D] of unit norm, and a centre [K]."""

    def draw(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1)

    student, teacher = draw(views, case.rows, case.dim), draw(_TEACHERS, case.rows, case.dim)
    ws, wt = draw(case.columns, case.dim), draw(case.columns, case.dim)
    return student.requires_grad_(), teacher, ws.requires_grad_(), wt, torch.zeros(case.columns)


def ours_dino(case: Case) -> Loss:
    def loss(student: Tensor, teacher: Tensor, ws: Tensor, wt: Tensor, center: Tensor) -> Tensor:
        return prototype_terms(student, teacher, ws, wt, center=center, entropy=False, **_TEMPS)[0]

    return loss


def eager_dino(case: Case) -> Loss:
    """Compute our reference definition: all logits, and every pair of views in one product."""

    def loss(student: Tensor, teacher: Tensor, ws: Tensor, wt: Tensor, center: Tensor) -> Tensor:
        return reference.prototype_cross_entropy(student, teacher, ws, wt, center=center, **_TEMPS)

    return loss


def lightly_dino(case: Case) -> Loss:
    from lightly.loss import DINOLoss

    criterion = DINOLoss(case.columns, center_momentum=1.0).to(case.device)  # keeps the centre constant

    def loss(student: Tensor, teacher: Tensor, ws: Tensor, wt: Tensor, center: Tensor) -> Tensor:
        with torch.no_grad():
            targets = [view @ wt.T for view in teacher]
        return criterion(targets, [view @ ws.T for view in student], teacher_temp=_TEMPS["teacher_temp"])

    return loss


# The twin's loss is near 0 at random features, so a comparison would say nothing. Half of the entropy is the same work.
_PART = 0.5


def ours_dino_er(case: Case) -> Loss:
    def loss(student: Tensor, teacher: Tensor, ws: Tensor, wt: Tensor, center: Tensor) -> Tensor:
        reconstruction, entropy = prototype_terms(student, teacher, ws, wt, center=center, **_TEMPS)
        return reconstruction - _PART * entropy

    return loss


def eager_dino_er(case: Case) -> Loss:
    def loss(student: Tensor, teacher: Tensor, ws: Tensor, wt: Tensor, center: Tensor) -> Tensor:
        reconstruction = reference.prototype_cross_entropy(student, teacher, ws, wt, center=center, **_TEMPS)
        rows = student.flatten(0, 1)
        return reconstruction - _PART * reference.prototype_entropy(rows, ws, temp=_TEMPS["student_temp"])[0]

    return loss


def scores(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return cosines [B, K] of unit features and prototypes. Assignments have no gradient."""
    rows, columns = (F.normalize(torch.randn(n, case.dim, generator=generator)) for n in (case.rows, case.columns))
    return (rows @ columns.T,)


def ours_sinkhorn(case: Case) -> Loss:
    return sinkhorn


def lightly_sinkhorn(case: Case) -> Loss:
    from lightly.loss.swav_loss import sinkhorn as theirs

    return theirs


def _case(rows: int, dim: int, columns: int) -> Case:
    return Case(f"B={rows} K={columns} D={dim}", rows, dim, columns)


_SIZES = (_case(64, 256, 65536), _case(16, 256, 65536), _case(128, 64, 2048))
DINO = Operation(
    name="dino",
    cases=_SIZES,
    inputs=features_and_prototypes,
    contestants={
        OURS: ours_dino,
        "eager": eager_dino,
        "torch.compile": compiled(eager_dino),
        "lightly": lightly_dino,
    },
    baseline="lightly",
)
DINO_ER = Operation(
    name="dino+er",
    cases=_SIZES,
    inputs=features_and_prototypes,
    contestants={OURS: ours_dino_er, "eager": eager_dino_er, "torch.compile": compiled(eager_dino_er)},
    baseline="eager",
)
SINKHORN = Operation(
    name="sinkhorn",
    cases=(_case(2048, 128, 3000), _case(256, 128, 3000)),
    inputs=scores,
    contestants={OURS: ours_sinkhorn, "lightly": lightly_sinkhorn},
    baseline="lightly",
)
OPERATIONS = (DINO, DINO_ER, SINKHORN)
