"""The entropy-reconstruction objective, once for the sphere and once for prototypes (arXiv 2307.10907, equation 2).

    loss = reconstruction - entropy          = -(lower bound of I(Z1; Z2))

The von Mises-Fisher normaliser is the same in both terms and cancels, so the loss is formed without it; what is
logged has it, in nats.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..kernels import prototype_terms
from ..kernels.collectives import Group
from ..losses import Bound
from ..losses.entropy_reconstruction import sphere_bound, sphere_terms
from .base import Objective


def sphere(projections: Tensor, *, kappa: float, group: Group | None) -> Objective:
    """ER of unit-norm projections [V, B, D] whose branches all carry gradient (section 2.2: SimCLR).

    Reconstruction is the mean over all pairs of views, entropy (Joe's average) the mean over views.
    """
    entropy, reconstruction = sphere_terms(projections, kappa=kappa, group=group)
    bound = sphere_bound(entropy.detach(), reconstruction.detach(), dim=projections.shape[-1], kappa=kappa)
    return Objective(reconstruction - entropy, bound)


def discrete(
    student: Tensor,
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    center: Tensor | None,
    group: Group | None,
    twin: bool,
    measure: bool,
) -> Objective:
    """Cross-entropy to the teacher and, for the ``twin``, less H(mean student assignment) (section 2.2: DINO).

    The entropy is that of the student's assignments, all views together: the variable that carries gradient. Both come
    from the same passes over the prototypes; ``measure`` asks for the bound where the objective alone does not need it.
    Shapes as in :func:`fasttrain.kernels.prototype_cross_entropy`.
    """
    reconstruction, entropy = prototype_terms(
        student,
        teacher,
        student_prototypes,
        teacher_prototypes,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        center=center,
        entropy=twin or measure,
        group=group,
    )
    bound = None
    if twin or measure:
        bound = Bound(entropy.detach(), math.log(len(student_prototypes)), reconstruction.detach())
    return Objective(reconstruction - entropy if twin else reconstruction, bound)
