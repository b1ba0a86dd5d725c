"""SIGReg, the regulariser of LeJEPA (arXiv 2511.08544), with the interface of lightly 1.6's ``SIGReg``."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import sliced_characteristic
from ..kernels.backend import Backend
from ..kernels.checks import check_positive
from ..kernels.precision import at_least_single
from .base import Loss


class SIGRegLoss(Loss):
    """The distance of projections from the law N(0, I), along random directions (arXiv 2511.08544, section 4).

        T(a) = N integral_(-t_max)^(t_max) |mean_n exp(i t <z_n, a>) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt

    It is the mean over ``num_vectors`` directions a, drawn for each call, and over the views. For a sample of N(0, I)
    it is about 1.06, whatever N. See :func:`fasttrain.kernels.sliced_characteristic`.

    Drop-in for ``lightly.loss.lejepa_loss.SIGReg``. Differences: the result and all sums are at least fp32, and no
    number per row, direction and knot is stored. With ``gather_distributed`` the sample is the rows of all ranks, and
    the first rank draws the directions.
    """

    def __init__(
        self,
        *,
        knots: int = 17,
        t_max: float = 3.0,
        num_vectors: int = 1024,
        gather_distributed: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(gather_distributed, backend)
        if knots < 2:
            raise ValueError(f"knots must be at least 2, got {knots}")
        check_positive(t_max, "t_max")
        if num_vectors < 1:
            raise ValueError(f"num_vectors must be at least 1, got {num_vectors}")
        self.knots, self.t_max, self.num_vectors = knots, t_max, num_vectors

    def forward(self, proj: Tensor, *, seed: int | None = None) -> Tensor:
        """Return the loss of projections [N, D], or of views [..., N, D]; a scalar.

        The directions are a function of ``seed`` and the device. Without a seed they come from torch's generator. Raise
        ValueError if the projections are not floating point [..., N, D].
        """
        if proj.ndim < 2 or not proj.is_floating_point():
            raise ValueError(f"proj must be floating point [..., N, D], got {proj.dtype} {tuple(proj.shape)}")
        self._compare_batches(proj)
        views = at_least_single(proj[None] if proj.ndim == 2 else proj.flatten(0, -3))
        return sliced_characteristic(
            views,
            self._directions(views, seed),
            knots=self.knots,
            limit=self.t_max,
            backend=self.backend,
            group=self.group,
            check_batches=False,
        )

    def _directions(self, views: Tensor, seed: int | None) -> Tensor:
        """Return unit vectors [D, num_vectors], the same on all ranks."""
        generator = None if seed is None else torch.Generator(views.device).manual_seed(seed)
        size = (views.shape[-1], self.num_vectors)
        drawn = torch.randn(size, dtype=views.dtype, device=views.device, generator=generator)
        group = self.group
        if group is not None and seed is None:
            dist.broadcast(drawn, dist.get_global_rank(group, 0), group=group)
        directions: Tensor = drawn / torch.linalg.vector_norm(drawn, dim=0)
        return directions
