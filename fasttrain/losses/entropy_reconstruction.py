"""The entropy-reconstruction bound as an objective (arXiv 2307.10907, equation 2): on the sphere, or over classes.

I(Z0; Z1) >= H(Z) - Rec,     Rec = -E log q(z1 | z0),     loss = Rec - H
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..kernels import log_sphere_area, row_logsumexp, vmf_entropy, vmf_reconstruction
from ..kernels.backend import Backend
from ..kernels.checks import check_pair, check_positive
from ..kernels.collectives import Group, gather_rows, mean_over_ranks, ranks_of
from ..kernels.entropy import Estimator
from ..kernels.precision import at_least_single
from ..kernels.vmf import log_vmf_normalizer, reference_log_vmf_normalizer
from .base import Loss, unit_pair

Support = Literal["sphere", "discrete"]


@dataclass(frozen=True)
class Bound:
    """``I(Z0; Z1) >= entropy - reconstruction``, in nats (arXiv 2307.10907, equation 2)."""

    entropy: Tensor
    entropy_max: float
    """The entropy of the uniform law: the log area of the sphere, or the logarithm of the number of classes."""
    reconstruction: Tensor
    unbiased_entropy: Tensor | None = None
    """The entropy without the estimator's bias, if it has one (on the sphere: each row's kernel on itself)."""

    @property
    def deficit(self) -> Tensor:
        """The distance of the entropy from its maximum, which compares methods, spaces and dimensions."""
        return self.entropy_max - (self.entropy if self.unbiased_entropy is None else self.unbiased_entropy)

    @property
    def information(self) -> Tensor:
        """The bound itself: entropy minus reconstruction."""
        return self.entropy - self.reconstruction


class EntropyReconstructionLoss(Loss):
    """Reconstruction minus entropy of two views whose branches both carry gradient, in nats.

    ``support="sphere"``, for projections z [N, D] of any norm, u = z / |z|, with the von Mises-Fisher density:

        Rec = -log C_D(kappa) - kappa mean_i <u0_i, u1_i>
        H   = mean over both views of the kernel density estimate of :func:`fasttrain.kernels.vmf_entropy`

    C_D has no gradient and cancels, so the loss omits it. kappa = 10 is a temperature of 0.1.

    ``support="discrete"``, for logits [N, K] and p = softmax(logits), all in log space:

        Rec = 1/2 mean_i [ CE(p0_i, p1_i) + CE(p1_i, p0_i) ],   CE(a, b) = -sum_k a_k log b_k
        H   = mean over both views of the entropy of mean_i p_i, at most log K

    Unlike :class:`DINOLoss` it accepts no features with prototypes. There the target is a constant, of which the
    cross-entropy needs only W^T p; here both sides carry gradient. For one detached side use
    :func:`fasttrain.kernels.prototype_terms`.

    For classes ``kappa`` and ``estimator`` have no effect, and ``leave_one_out`` is refused. The paper's code also has
    an "average" for classes. It is not offered because it is no entropy: uniform classes minimise it.

    With ``gather_distributed`` the batch is the rows of all ranks, and every rank returns the same value. Raise
    ValueError for a kappa that is not positive, or an unknown support or estimator.
    """

    def __init__(
        self,
        kappa: float = 10.0,
        support: Support = "sphere",
        estimator: Estimator = "average",
        leave_one_out: bool = False,
        *,
        gather_distributed: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        check_positive(kappa, "kappa")
        for name, value, known in (("support", support, Support), ("estimator", estimator, Estimator)):
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
        if leave_one_out and support == "discrete":
            raise ValueError("leave_one_out: applies to support='sphere' only. Leave it out for classes.")
        self.kappa = kappa
        self.support = support
        self.estimator = estimator
        self.leave_one_out = leave_one_out

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Return the loss of two views' projections [N, D >= 2] or logits [N, K]; a scalar.

        Raise ValueError if they differ in shape, dtype or device, or for a single row with ``leave_one_out``.
        """
        entropy, reconstruction = self._relative_terms(z0, z1)
        return reconstruction - entropy

    def terms(self, z0: Tensor, z1: Tensor, *, normalizer: Literal["exact", "reference"] = "exact") -> Bound:
        """Return entropy, its maximum, and reconstruction with their normaliser, as fp64 scalars with gradient.

        To train and log from one pass, minimise ``-terms(z0, z1).information``: it is the loss. ``"reference"`` uses
        the normaliser of the paper's code (off by 83 nats at D = 128), to compare with its figures.
        """
        entropy, reconstruction = self._relative_terms(z0, z1)
        if self.support == "discrete":
            return Bound(entropy.double(), math.log(z0.shape[1]), reconstruction.double())
        return sphere_bound(entropy, reconstruction, dim=z0.shape[1], kappa=self.kappa, normalizer=normalizer)

    def _relative_terms(self, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
        self._compare_batches(z0, z1)
        if self.support == "discrete":
            check_pair(z0, z1, "z0", "z1", same_rows=True)
            return discrete_terms(z0, z1, group=self.group)
        views = unit_pair(z0, z1, "z0", "z1")
        return sphere_terms(
            views,
            [views],
            kappa=self.kappa,
            estimator=self.estimator,
            leave_one_out=self.leave_one_out,
            backend=self.backend,
            group=self.group,
        )


def sphere_terms(
    variables: Sequence[Tensor] | Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    kappa: float,
    estimator: Estimator = "average",
    leave_one_out: bool = False,
    support: Tensor | None = None,
    backend: Backend = "auto",
    group: Group | None = None,
) -> tuple[Tensor, Tensor]:
    """Return entropy and reconstruction of unit-norm rows, both without ``-log C_D(kappa)``, in nats.

        entropy        = mean over ``variables``, each [N, D], of the kernel density estimate
        reconstruction = mean over ``pairs`` (query [N, D], target [N, D]) of ``-kappa mean_i <q_i, t_i>``

    The kernels are centred on the variable's own rows or, if given, on the rows of ``support`` [Q, D], which gets no
    gradient. All ranks must have equal batches. The messages do not depend on the number of views and pairs.
    """
    reconstruction = torch.stack([vmf_reconstruction(q, t, kappa=kappa, normalizer="none") for q, t in pairs]).mean()
    views = variables if isinstance(variables, Tensor) else torch.stack(list(variables))
    if support is None:
        entropy = vmf_entropy(
            views,
            kappa=kappa,
            estimator=estimator,
            leave_one_out=leave_one_out,
            normalizer="none",
            backend=backend,
            group=group,
            check_batches=False,
        ).mean()
        return entropy, mean_over_ranks(reconstruction, group)
    lse = [row_logsumexp(z, support.detach(), scale=kappa, unit_norm=True, backend=backend).mean() for z in views]
    entropy = math.log(len(support)) - torch.stack(lse).mean()
    return mean_over_ranks(entropy, group), mean_over_ranks(reconstruction, group)


def sphere_bound(
    entropy: Tensor,
    reconstruction: Tensor,
    *,
    dim: int,
    kappa: float,
    normalizer: Literal["exact", "reference"] = "exact",
) -> Bound:
    """Return the bound of :func:`sphere_terms`, with ``-log C_dim(kappa)`` added in fp64 (-4898 nats at dim = 2048)."""
    if normalizer not in ("exact", "reference"):
        raise ValueError(f"normalizer must be 'exact' or 'reference', got {normalizer!r}")
    log_normalizer = log_vmf_normalizer if normalizer == "exact" else reference_log_vmf_normalizer
    constant = -log_normalizer(dim, kappa)
    return Bound(entropy.double() + constant, log_sphere_area(dim), reconstruction.double() + constant)


def discrete_terms(logits0: Tensor, logits1: Tensor, *, group: Group | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean entropy of the two marginals, and the symmetrised cross-entropy, of logits [N, K].

    All ranks must have equal batches.
    """
    log_p = [at_least_single(logits).log_softmax(1) for logits in (logits0, logits1)]
    entropy = torch.stack([_marginal_entropy(x, group) for x in log_p]).mean()
    p0, p1 = (x.exp() for x in log_p)
    crossed = (p0 * log_p[1] + p1 * log_p[0]).sum(1).mean() / 2
    return entropy, -mean_over_ranks(crossed, group)


def _marginal_entropy(log_p: Tensor, group: Group | None) -> Tensor:
    """Return the entropy of the mean of the rows exp(log_p) [N, K] of all ranks."""
    ranks = ranks_of(group)
    marginal = gather_rows(log_p.logsumexp(0, keepdim=True), group).logsumexp(0) - math.log(len(log_p) * ranks)
    return -(marginal.exp() * marginal).sum()
