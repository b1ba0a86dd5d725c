"""The entropy-reconstruction objective, on the sphere and over prototypes (arXiv 2307.10907, equation 2).

    loss = reconstruction - entropy          = -(lower bound of I(Z1; Z2))

The von Mises-Fisher normaliser is the same in both terms and cancels. The loss is computed without it; logged values
include it, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..flags import Positive, flag
from ..kernels import log_vmf_normalizer, vmf_entropy
from ..losses import Bound
from ..losses.entropy_reconstruction import sphere_bound, sphere_terms
from .base import Method, Objective, Step

_FEW = 64
"""Images per batch below which the twin's entropy has little range."""


@dataclass(frozen=True)
class SphereSettings:
    """The settings of all methods whose bound is on the sphere."""

    kappa: Positive = flag(10.0, "concentration of the von Mises-Fisher kernel of the bound")
    entropy_leave_one_out: bool = flag(False, "leave each row's kernel on itself out of the twin's entropy")


class SphereMethod(Method):
    """A method whose bound is on the sphere. Its settings derive from :class:`SphereSettings`."""

    space: ClassVar[str | None] = "sphere"

    @classmethod
    def check(cls, settings: Any, batch: int) -> None:
        """Raise ValueError if a single row would be left out of itself."""
        if settings.entropy_leave_one_out and batch == 1:
            raise ValueError(
                "--entropy_leave_one_out: needs at least 2 images per batch, got 1. Raise --batch_size_per_gpu."
            )

    def warnings_for(self, images: int, batch: int) -> list[str]:
        """Warn if the batch is too small for the twin's entropy."""
        if not (self.entropy and batch < _FEW):
            return []
        return [
            f"warning: --batch_size_per_gpu: {batch} images limit the twin's entropy to a range of "
            f"log {batch} = {math.log(batch):.2f} nats. Use a larger batch."
        ]

    def sphere_objective(
        self,
        variables: Sequence[Tensor] | Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        step: Step,
        *,
        support: Tensor | None = None,
    ) -> Objective:
        """Return the entropy-reconstruction objective of unit-norm rows.

        It is the mean over pairs of ``-kappa cos``, minus the kernel entropy of ``variables``, each [B, D]. The
        variables carry the gradient: training raises their entropy (Joe's average). ``pairs`` are (query, target), each
        [B, D]; detach targets that the method does not train through. The kernels are centred on the variable's own
        rows or, if given, on the rows of ``support`` [Q, D].

        A row's kernel on itself has no gradient. In a small batch of spread-out rows it is most of the density and so
        takes away most of the entropy's force. The paper's estimate includes it; ``entropy_leave_one_out`` leaves it
        out.
        """
        settings: Any = self.settings
        kappa, group = settings.kappa, self.group
        entropy, reconstruction = sphere_terms(
            variables,
            pairs,
            kappa=kappa,
            leave_one_out=settings.entropy_leave_one_out and support is None,
            support=support,
            group=group,
        )
        loss = reconstruction - entropy
        logs = {"entropy": entropy.detach(), "reconstruction": reconstruction.detach()}
        if not step.measure:
            return Objective(loss, logs=logs)
        rows = (variables if isinstance(variables, Tensor) else torch.stack(list(variables))).detach()
        dim = rows.shape[2]
        # A row's own kernel shifts the estimate by up to log B. The deficit compares methods, so it leaves it out.
        unbiased = vmf_entropy(
            rows,
            kappa=kappa,
            normalizer="none",
            group=group,
            leave_one_out=rows.shape[1] > 1,
            check_batches=False,
        ).mean()
        bound = sphere_bound(entropy.detach(), reconstruction.detach(), dim=dim, kappa=kappa)
        bound = replace(bound, unbiased_entropy=unbiased.double() - log_vmf_normalizer(dim, kappa))
        return Objective(loss, bound, rows.flatten(0, 1), logs)


class PrototypeMethod(Method):
    """A method whose bound is over prototypes: cross-entropy to assignments, and the entropy of their mean."""

    space: ClassVar[str | None] = "prototypes"

    @property
    def prototype_count(self) -> int:
        """The number of prototypes or clusters of one head."""
        return int(self.settings.nmb_prototypes)

    def warnings_for(self, images: int, batch: int) -> list[str]:
        """Warn if assignments or images are fewer than the prototypes need."""
        warnings = []
        if self.entropy and batch < _FEW:
            rows = batch * self.n_views
            warnings.append(
                f"warning: --batch_size_per_gpu: {rows} sharp assignments limit the twin's entropy to "
                f"log {rows} = {math.log(rows):.2f} nats. Use a larger batch."
            )
        if self.prototype_count > images:
            warnings.append(f"warning: {self.prototype_count} prototypes are more than the {images} images. Use fewer.")
        return warnings

    def prototype_objective(
        self, reconstruction: Tensor, entropy: Tensor | None, projections: Tensor, step: Step
    ) -> Objective:
        """Return the objective from the cross-entropy and the entropy of the mean assignment (section 2.2: DINO).

        The loss is the reconstruction and, for the twin, minus the entropy. The variable of the entropy is the
        student's assignments over all views, because they carry the gradient. It is None if it was not computed.
        """
        loss = reconstruction if entropy is None or not self.entropy else reconstruction - entropy
        if entropy is None:
            return Objective(loss)
        logs = {"entropy": entropy.detach(), "reconstruction": reconstruction.detach()}
        if not step.measure:
            return Objective(loss, logs=logs)
        bound = Bound(entropy.detach(), math.log(self.prototype_count), reconstruction.detach())
        return Objective(loss, bound, projections.detach().flatten(0, -2), logs)


def in_product_dtype(*factors: Tensor) -> tuple[Tensor, ...]:
    """Return the factors of large products in the dtype in which autocast would run a linear layer.

    On a GPU under bf16 autocast that is bf16: normalised rows leave autocast in fp32, whose products take three passes
    on tensor cores at half the rate. Sums and exponentials stay fp32. CPU factors stay as they are, because bf16 is not
    faster there. So do factors under fp16, which the prototypes' kernels convert to fp32.
    """
    return tuple(factor.to(torch.bfloat16) for factor in factors) if _in_bf16(factors[0].device.type) else factors


def _in_bf16(device: str) -> bool:
    return device != "cpu" and torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
