"""Regularisers of a batch: KoLeo, VICReg, Barlow Twins, SIGReg, and SigLIP's loss of all pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.kernels import siglip, sliced_characteristic
from fasttrain.losses import BarlowTwinsLoss, KoLeoLoss, VICRegLoss

from . import OURS, Case, Loss, Operation
from .libraries import compiled
from .similarity import unit, views

_SIGREG_VIEWS, _BIAS = 8, -10.0


def rows(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(case.rows, case.dim, generator=generator).requires_grad_(),)


def views_and_slices(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return projections [8, N, D] and unit directions [D, S]."""
    z = torch.randn(_SIGREG_VIEWS, case.rows, case.dim, generator=generator).requires_grad_()
    return z, F.normalize(torch.randn(case.dim, case.columns, generator=generator), dim=0)


def ours_koleo(case: Case) -> Loss:
    return KoLeoLoss()


def lightly_koleo(case: Case) -> Loss:
    from lightly.loss import KoLeoLoss as Theirs

    return Theirs()


def ours_vicreg(case: Case) -> Loss:
    return VICRegLoss()


def eager_vicreg(case: Case) -> Loss:
    """Compute it as the authors do, with the covariance of each view."""

    def squared_covariances(z: Tensor) -> Tensor:
        z = z - z.mean(0)
        covariance = z.T @ z / (len(z) - 1)
        return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        hinge = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b)) / 2
        return 25 * F.mse_loss(a, b) + 25 * hinge + squared_covariances(a) + squared_covariances(b)

    return loss


def lightly_vicreg(case: Case) -> Loss:
    from lightly.loss import VICRegLoss as Theirs

    return Theirs()


def ours_barlow(case: Case) -> Loss:
    return BarlowTwinsLoss()


def lightly_barlow(case: Case) -> Loss:
    """Use lightly's loss, whose code is the authors'."""
    from lightly.loss import BarlowTwinsLoss as Theirs

    return Theirs()


def ours_sigreg(case: Case) -> Loss:
    return sliced_characteristic


def eager_sigreg(case: Case) -> Loss:
    """Compute it as the authors' README: all angles, cosines and sines at once."""
    t = torch.linspace(0, 3, 17, device=case.device)
    weights = torch.full_like(t, 2 * 3 / 16)
    weights[[0, -1]] /= 2
    normal = torch.exp(-t.square() / 2)

    def loss(z: Tensor, slices: Tensor) -> Tensor:
        angles = (z @ slices)[..., None] * t
        errors = (angles.cos().mean(-3) - normal).square() + angles.sin().mean(-3).square()
        return ((errors @ (weights * normal)) * z.shape[-2]).mean()

    return loss


def ours_siglip(case: Case) -> Loss:
    return lambda x, y: siglip(unit(x), unit(y), scale=case.scale, bias=_BIAS)


def eager_siglip(case: Case) -> Loss:
    """Compute it as open_clip does, with a matrix of logits and one of labels."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = case.scale * unit(x) @ unit(y).T + _BIAS
        labels = 2 * torch.eye(len(x), device=x.device) - 1
        return -F.logsigmoid(labels * logits).sum() / len(x)

    return loss


def _case(rows: int, dim: int, columns: int = 0) -> Case:
    return Case(f"N={rows}" + (f" S={columns}" if columns else "") + f" D={dim}", rows, dim, columns)


KOLEO = Operation(
    name="koleo",
    cases=(_case(1024, 256), _case(8192, 256)),
    inputs=rows,
    contestants={OURS: ours_koleo, "lightly": lightly_koleo},
    baseline="lightly",
)
VICREG = Operation(
    name="vicreg",
    cases=(_case(256, 2048), _case(1024, 8192)),
    inputs=views,
    contestants={OURS: ours_vicreg, "eager": eager_vicreg, "lightly": lightly_vicreg},
    baseline="eager",
)
BARLOW = Operation(
    name="barlow",
    cases=(_case(256, 2048), _case(1024, 8192)),
    inputs=views,
    contestants={OURS: ours_barlow, "lightly": lightly_barlow},
    baseline="lightly",
)
SIGREG = Operation(
    name="sigreg",
    cases=(_case(128, 128, 1024), _case(1024, 128, 1024)),
    inputs=views_and_slices,
    contestants={OURS: ours_sigreg, "eager": eager_sigreg},
    baseline="eager",
)
SIGLIP = Operation(
    name="siglip",
    cases=(_case(1024, 512), _case(4096, 512)),
    inputs=views,
    contestants={OURS: ours_siglip, "eager": eager_siglip, "torch.compile": compiled(eager_siglip)},
    baseline="eager",
)
OPERATIONS = (KOLEO, VICREG, BARLOW, SIGREG, SIGLIP)
