"""SIGReg's statistic of sliced characteristic functions, on every backend and across ranks (arXiv 2511.08544)."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend, choose_backend
from ..checks import check_positive, check_rows
from ..collectives import Group, check_equal_batches, mean_over_ranks
from . import op, reference
from .quadrature import knots_and_weights


def sliced_characteristic(
    z: Tensor,
    slices: Tensor,
    *,
    knots: int = 17,
    limit: float = 3.0,
    backend: Backend = "auto",
    group: Group | None = None,
    check_batches: bool = True,
) -> Tensor:
    """Return the Epps-Pulley distance from N(0, I) of rows z [N, D] or views [V, N, D], mean over slices and views.

        p = z slices,   phi(t) = mean_n exp(i t p_n)
        T = N integral_(-limit)^(limit) |phi(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt

    by the trapezoid rule at ``knots`` equal steps of [0, limit], doubled, because the integrand is even. ``slices``
    [D, S] are directions of unit norm, which get no gradient. T is about its expectation of a normal sample if z is
    normal, and grows with N otherwise. Only [V, 2, knots, S] sums are stored, no number per row and knot. Sums are at
    least fp32.

    With ``group`` the rows of all ranks are the sample, and slices must be the same on every rank. Raises ValueError if
    shapes or types do not fit, or for fewer than 2 knots or a limit that is not positive.
    """
    if check_batches:
        check_equal_batches("sliced_characteristic", group, z)
    views = z if z.ndim == 3 else z[None]
    check_rows(views.flatten(0, 1), "z")
    check_rows(slices, "slices")
    if slices.shape[0] != views.shape[2] or slices.device != z.device:
        raise ValueError(
            f"slices must be [D = {views.shape[2]}, S] on {z.device}, got {tuple(slices.shape)} on {slices.device}"
        )
    if knots < 2:
        raise ValueError(f"knots must be at least 2, got {knots}")
    check_positive(limit, "limit")
    chosen, slices = choose_backend(backend, z), slices.detach()
    if chosen == "eager":
        sums = reference.characteristic_sums(views, slices, knots, limit)
    else:
        sums = op.characteristic_sums(views, slices, knots, limit, chosen)
    rows = views.shape[1]
    cosine, sine = mean_over_ranks(sums / rows, group).unbind(1)
    _, normal, weights = knots_and_weights(knots, limit, sums)
    errors = (cosine - normal[:, None]).square() + sine.square()
    count = rows * (1 if group is None else group.size())
    return count * (errors * weights[:, None]).sum(1).mean()
