"""The entropy-reconstruction objective, once for the sphere and once for prototypes (arXiv 2307.10907, equation 2).

    loss = reconstruction - entropy          = -(lower bound of I(Z1; Z2))

The von Mises-Fisher normaliser is the same in both terms and cancels, so the loss is formed without it; what is
logged has it, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..flags import flag
from ..kernels import log_vmf_normalizer, prototype_terms, row_logsumexp, vmf_entropy, vmf_reconstruction
from ..kernels.collectives import Group, mean_over_ranks
from ..losses import Bound
from ..losses.entropy_reconstruction import sphere_bound
from .base import Objective


@dataclass(frozen=True)
class SphereSettings:
    """What methods whose bound is on the sphere have in common."""

    kappa: float = flag(10.0, "concentration of the von Mises-Fisher kernel, for the bound", above=0)
    entropy_leave_one_out: bool = flag(False, "leave a row's kernel on itself out of the twin's entropy")


def sphere(
    variables: Sequence[Tensor] | Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    settings: SphereSettings,
    *,
    group: Group | None,
    support: Tensor | None = None,
    measure: bool,
) -> Objective:
    """ER of unit-norm rows: ``mean over pairs of -kappa cos``, less the kernel entropy of ``variables``, each [B, D].

    ``variables`` carry gradient: their entropy (Joe's average) is what rises. ``pairs`` are (query, target), each
    [B, D]; detach the targets that the method does not train through. The kernels stand on the variable's own rows
    or, if it is given, on the rows of ``support`` [Q, D], which has no gradient.

    A row's kernel on itself has no gradient but is most of the density in a batch that is spread out, and so takes most
    of the force out of the entropy, the more so the smaller the batch. The paper's estimate has it;
    ``settings.entropy_leave_one_out`` leaves it out.
    """
    kappa, alone = settings.kappa, settings.entropy_leave_one_out
    entropy_of = partial(vmf_entropy, kappa=kappa, normalizer="none", group=group)
    rec_of = partial(vmf_reconstruction, kappa=kappa, normalizer="none", group=group)
    reconstruction = torch.stack([rec_of(query, target) for query, target in pairs]).mean()
    if support is None:
        entropies = [entropy_of(z, leave_one_out=alone) for z in variables]
    else:
        entropies = [_entropy_against(z, support, kappa, group) for z in variables]
    entropy = torch.stack(entropies).mean()
    loss = reconstruction - entropy
    terms = {"entropy": entropy.detach(), "reconstruction": reconstruction.detach()}
    if not measure:
        return Objective(loss, terms=terms)
    rows = [z.detach() for z in variables]
    dim = rows[0].shape[1]
    # A row's own kernel bends the estimate by up to log B; the entropy to compare methods by is free of it.
    unbiased = torch.stack([entropy_of(z, leave_one_out=len(z) > 1) for z in rows]).mean()
    bound = sphere_bound(entropy.detach(), reconstruction.detach(), dim=dim, kappa=kappa)
    bound = replace(bound, unbiased_entropy=unbiased.double() - log_vmf_normalizer(dim, kappa))
    return Objective(loss, bound, torch.cat(rows), terms)


def _entropy_against(z: Tensor, support: Tensor, kappa: float, group: Group | None) -> Tensor:
    """``log Q - mean_i log sum_j exp(kappa <z_i, s_j>)``: the kernels stand on ``support`` [Q, D]."""
    lse = row_logsumexp(z, support.detach(), scale=kappa, unit_norm=True)
    return math.log(len(support)) - mean_over_ranks(lse.mean(), group)


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
    Shapes as in :func:`fasttrain.kernels.prototype_cross_entropy`. On a GPU in bf16 their products are formed in it.
    """
    reconstruction, entropy = prototype_terms(
        *in_product_type(student, teacher, student_prototypes, teacher_prototypes),
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        center=center,
        entropy=twin or measure,
        group=group,
    )
    loss = reconstruction - entropy if twin else reconstruction
    if not measure:
        terms = {"entropy": entropy.detach(), "reconstruction": reconstruction.detach()} if twin else {}
        return Objective(loss, terms=terms)
    bound = Bound(entropy.detach(), math.log(len(student_prototypes)), reconstruction.detach())
    return Objective(loss, bound, student.detach().flatten(0, 1))


def in_product_type(*factors: Tensor) -> tuple[Tensor, ...]:
    """The factors of large products, as autocast would hand them to a linear layer: in bf16 on a GPU that runs in it.

    Normalised rows leave autocast in fp32, whose products take three passes on tensor cores at half the rate. Sums and
    exponentials stay fp32. So do the factors on the CPU, which is no faster in bf16, and in fp16, of which the
    prototypes' kernels make fp32.
    """
    return tuple(factor.to(torch.bfloat16) for factor in factors) if _in_bf16(factors[0].device.type) else factors


def _in_bf16(device: str) -> bool:
    return device != "cpu" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
