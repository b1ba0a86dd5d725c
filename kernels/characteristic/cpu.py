"""The CPU path: tiles of projections that stay in the cache, one cosine and one sine for each.

    theta = (limit / (knots - 1)) <z_n, a_s>,    so the knot k has the angle k theta
    cos((k + 1) theta) = 2 cos(theta) cos(k theta) - cos((k - 1) theta),   and the same for the sine     (Chebyshev)

Backward: the gradient of theta is ``sum_k alpha_k cos(k theta) + beta_k sin(k theta)``, whose coefficients [K] are the
same for all rows. It is summed from the last knot down, with the same recurrence (Clenshaw):

    b_k = alpha_k + 2 cos(theta) b_(k+1) - b_(k+2),    sum_k alpha_k cos(k theta) = b_1 cos(theta) - b_2
    d_k = beta_k + 2 cos(theta) d_(k+1) - d_(k+2),     sum_k beta_k sin(k theta) = d_1 sin(theta)

A step of the recurrence is one call, which overwrites the older of two buffers. So no term is negated: the buffers hold
the terms with the signs + + - - of :func:`_signs`, in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import at_least_single
from ..spans import equal_spans

_ROWS, _SLICES = 1024, 64


def sums(z: Tensor, slices: Tensor, knots: int, limit: float) -> Tensor:
    """Return the sums of cosines and sines over the rows [V, 2, knots - 1, S]; see reference.py."""
    z = at_least_single(z)
    directions = slices.to(z.dtype) * (limit / (knots - 1))
    result = z.new_zeros(len(z), 2, knots - 1, slices.shape[1])
    for rows in equal_spans(z.shape[1], _ROWS):
        for part in equal_spans(slices.shape[1], _SLICES):
            for view, total in zip(z[:, rows], result[..., part], strict=True):
                now = _cosine_and_sine(view, directions[:, part])
                double = now[0] * 2
                before = torch.zeros_like(now)
                before[0] = 1
                total[:, 0] += now.sum(1)
                for k in range(2, knots):
                    now, before = before.addcmul_(double, now, value=1 if k % 2 else -1), now
                    total[:, k - 1] += now.sum(1)
    return result.mul_(_signs(knots, result))


def gradient(z: Tensor, slices: Tensor, of_sums: Tensor, limit: float) -> Tensor:
    """Return the gradient of z from the gradient of the sums [V, 2, knots - 1, S], in the type of the sums."""
    z = at_least_single(z)
    knots = of_sums.shape[2] + 1
    directions = slices.to(z.dtype) * (limit / (knots - 1))
    coefficients = coefficients_of(of_sums) * _signs(knots, of_sums)
    dz = torch.zeros_like(z)
    for rows in equal_spans(z.shape[1], _ROWS):
        for part in equal_spans(slices.shape[1], _SLICES):
            for view, of_view, coefficient in zip(z[:, rows], dz[:, rows], coefficients[..., part], strict=True):
                cosine, sine = trigonometric = _cosine_and_sine(view, directions[:, part])
                double = cosine * 2
                now, later = (torch.zeros_like(trigonometric) for _ in range(2))
                for k in range(knots - 1, 0, -1):
                    now, later = later.addcmul_(double, now, value=-1 if k % 2 else 1), now
                    now += coefficient[:, k - 1, None]
                # b_1 has the sign +, and b_2 the sign -.
                of_angles = later[0].addcmul_(now[0], cosine).addcmul_(now[1], sine)
                of_view.addmm_(of_angles, directions[:, part].T)
    return dz


def coefficients_of(of_sums: Tensor) -> Tensor:
    """Return alpha and beta [V, 2, knots - 1, S] from the gradient of the sums of cosines and sines."""
    k = torch.arange(1, of_sums.shape[2] + 1, dtype=of_sums.dtype, device=of_sums.device)[:, None]
    return torch.stack([of_sums[:, 1] * k, of_sums[:, 0] * -k], dim=1)


def _cosine_and_sine(rows: Tensor, directions: Tensor) -> Tensor:
    """Return the cosine and the sine of the angles of a tile, [2, N, S]."""
    both = rows.new_empty(2, len(rows), directions.shape[1])
    torch.mm(rows, directions, out=both[1])  # autocast does not change calls with out=
    torch.cos(both[1], out=both[0])
    both[1].sin_()
    return both


def _signs(knots: int, like: Tensor) -> Tensor:
    """Return the signs of the knots 1 to knots - 1 in the buffers, [knots - 1, 1]: + - - + + - - ..."""
    k = torch.arange(1, knots, device=like.device)
    return (1 - 2 * (k // 2 % 2)).to(like.dtype)[:, None]
