"""The coding rate of rows: the entropy of a Gaussian with their covariance and noise, without the noise's own."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_positive
from .collectives import Group, check_equal_batches, mean_over_ranks
from .precision import at_least_single


def coding_rate(z: Tensor, *, eps: float, group: Group | None = None, check_batches: bool = True) -> Tensor:
    """Return the coding rate of each of the views [V, N, D], as [V], in nats.

        R_v = 1/2 log det(I + D / (N eps) Z_v^T Z_v)

    It is the differential entropy of a Gaussian with the rows' second moments plus noise of variance ``eps / D`` in
    every direction, minus the entropy of this noise (Ma et al. 2007, equation 7, with ``eps`` for their epsilon
    squared). It is 0 for rows of zeros. For rows of norm 1 it is largest, ``D/2 log(1 + 1/eps)``, if their second
    moments are the same in all directions.

    With ``group`` the rows of all ranks count, and N is their number. The smaller of the N x N and the D x D matrix is
    factored. Raise ValueError for other shapes, or an ``eps`` that is not positive.
    """
    if check_batches:
        check_equal_batches("coding_rate", group, z)
    check_positive(eps, "eps")
    if z.ndim != 3 or 0 in z.shape or not z.is_floating_point():
        raise ValueError(f"z: must be floating-point views [V, N, D], none of them 0, got {z.dtype} {tuple(z.shape)}")
    rows, dim = z.shape[1:]
    with torch.autocast(z.device.type, enabled=False):  # a determinant needs full precision
        z = at_least_single(z)
        z = z if group is None and rows < dim else z.mT
        moments = mean_over_ranks(z @ z.mT / rows, group)
        noisy = torch.eye(len(moments[0]), dtype=z.dtype, device=z.device) + moments * (dim / eps)
        factor: Tensor = torch.linalg.cholesky_ex(noisy)[0]
        return factor.diagonal(dim1=1, dim2=2).log().sum(1)
