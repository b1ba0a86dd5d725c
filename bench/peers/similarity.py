"""Similarity operations: NT-Xent, InfoNCE, bidirectional InfoNCE, and the von Mises-Fisher entropy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.kernels import info_nce, nt_xent, vmf_entropy
from fasttrain.kernels.vmf import reference_log_vmf_normalizer
from fasttrain.losses import base
from fasttrain.losses.info_nce import symmetric_info_nce

from . import OURS, Case, Loss, NotRun, Operation
from .libraries import available_bytes, compiled, inf_cl, keops_logsumexp

# Inputs are projections of a network, so that every contestant normalises them. Entropies take unit rows.


def views(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return two views that share half of their variance."""
    shared, a, b = torch.randn(3, case.rows, case.dim, generator=generator)
    return (shared + a).requires_grad_(), (shared + b).requires_grad_()


def views_with_queue(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    queue = torch.randn(case.columns, case.dim, generator=generator)
    return *views(case, generator), F.normalize(queue)


def unit_rows(case: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (F.normalize(torch.randn(case.rows, case.dim, generator=generator)).requires_grad_(),)


def unit(z: Tensor) -> Tensor:
    """Normalise as our losses do: in fp32, returned in the type of z. Autocast would leave it in fp32."""
    return base.unit_rows(z, "z")


# NT-Xent


def ours_nt_xent(case: Case) -> Loss:
    return lambda z0, z1: nt_xent(unit(z0), unit(z1), temperature=case.temperature)


def eager_nt_xent(case: Case) -> Loss:
    """Compute it as most repositories do: all similarities, the diagonal masked, cross-entropy."""
    own = torch.eye(2 * case.rows, dtype=torch.bool, device=case.device)
    other_view = torch.arange(2 * case.rows, device=case.device).roll(case.rows)

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        rows = F.normalize(torch.cat([z0, z1]))
        scores = (rows @ rows.T / case.temperature).masked_fill(own, -torch.inf)
        return F.cross_entropy(scores, other_view)

    return loss


def plain_nt_xent(z0: Tensor, z1: Tensor, scale: float) -> Tensor:
    """Compute the loss of unit rows in the fewest torch calls. Our operator's overhead is relative to it."""
    both = torch.cat([z0, z1])
    scores = torch.addmm(both, both, both.T, beta=0, alpha=scale)  # addmm applies the scale at no cost
    lse = scores.fill_diagonal_(-torch.inf).logsumexp(1)
    return torch.sub(lse.mean(), torch.dot(z0.view(-1), z1.view(-1)), alpha=scale / len(z0))


def lightly_nt_xent(case: Case) -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=case.temperature)


def metric_learning_nt_xent(case: Case) -> Loss:
    """Use pytorch-metric-learning, which compares each positive pair with all negative pairs: (2B)^3 numbers."""
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    needed, available = 17 * (2 * case.rows) ** 3, available_bytes()  # measured at 2B = 64, 128 and 256
    if needed > available / 2:
        raise NotRun(f"its (2B)^3 matrices need {needed / 2**30:.0f} GiB; {available / 2**30:.0f} GiB are available")
    return SelfSupervisedLoss(NTXentLoss(temperature=case.temperature))


# InfoNCE


def ours_info_nce(case: Case) -> Loss:
    def loss(q: Tensor, k: Tensor, queue: Tensor | None = None) -> Tensor:
        return info_nce(unit(q), unit(k), queue, temperature=case.temperature)

    return loss


def eager_info_nce(case: Case) -> Loss:
    """Compute MoCo's form with a queue; without a queue the other keys of the batch are the negatives."""
    own = torch.arange(case.rows, device=case.device)

    def loss(q: Tensor, k: Tensor, queue: Tensor | None = None) -> Tensor:
        q, k = F.normalize(q), F.normalize(k)
        if queue is None:
            return F.cross_entropy(q @ k.T / case.temperature, own)
        scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / case.temperature
        return F.cross_entropy(scores, torch.zeros_like(own))

    return loss


def info_nce_pytorch(case: Case) -> Loss:
    from info_nce import InfoNCE

    return InfoNCE(temperature=case.temperature)


def lightly_queue(case: Case) -> Loss:
    """Use lightly's loss with its memory bank. Its time includes the enqueue of a few rows per step."""
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(temperature=case.temperature, memory_bank_size=(case.columns, case.dim))
    criterion.to(case.device)
    filled = False

    def loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
        nonlocal filled
        if not filled:
            filled = True
            criterion.memory_bank.bank = queue.clone()
        return criterion(q, k)

    return loss


def keops_info_nce(case: Case) -> Loss:
    keops_lse = keops_logsumexp(case)

    def loss(q: Tensor, k: Tensor, queue: Tensor | None = None) -> Tensor:
        q, k = F.normalize(q), F.normalize(k)
        positives = case.scale * (q * k).sum(1)
        if queue is None:
            return (keops_lse(q, k) - positives).mean()
        return (torch.logaddexp(positives, keops_lse(q, queue)) - positives).mean()

    return loss


def inf_cl_info_nce(case: Case) -> Loss:
    """Use Inf-CL (arXiv 2410.17243) in one direction."""
    one_way = inf_cl(case)
    return lambda q, k: one_way(F.normalize(q), F.normalize(k))


# Bidirectional, as CLIP's


def ours_bidirectional(case: Case) -> Loss:
    return lambda x, y: symmetric_info_nce(unit(x), unit(y), temperature=case.temperature)


def eager_bidirectional(case: Case) -> Loss:
    """Compute open_clip's formula: one matrix of logits, a cross-entropy in each direction."""
    own = torch.arange(case.rows, device=case.device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = case.scale * F.normalize(x) @ F.normalize(y).T
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return loss


def info_nce_pytorch_bidirectional(case: Case) -> Loss:
    one_way = info_nce_pytorch(case)
    return lambda x, y: (one_way(x, y) + one_way(y, x)) / 2


def inf_cl_bidirectional(case: Case) -> Loss:
    one_way = inf_cl(case)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x, y = F.normalize(x), F.normalize(y)
        return (one_way(x, y) + one_way(y, x)) / 2

    return loss


# Entropy


def ours_entropy(case: Case) -> Loss:
    return lambda z: vmf_entropy(z, kappa=case.scale, normalizer="reference")


def official_entropy(case: Case) -> Loss:
    """Compute the estimator of arXiv 2307.10907 as its authors do ("average"), with the constant computed once."""
    constant = math.log(case.rows) - reference_log_vmf_normalizer(case.dim, case.scale)
    return lambda z: (constant - torch.logsumexp(case.scale * torch.matmul(z, z.T), dim=-1)).mean()


def eager_entropy(case: Case) -> Loss:
    """Compute it with kappa on the features, which avoids reading the N x N scores once more."""
    constant = math.log(case.rows) - reference_log_vmf_normalizer(case.dim, case.scale)
    return lambda z: constant - torch.logsumexp((case.scale * z) @ z.T, dim=1).mean()


def keops_entropy(case: Case) -> Loss:
    keops_lse = keops_logsumexp(case)
    constant = math.log(case.rows) - reference_log_vmf_normalizer(case.dim, case.scale)
    return lambda z: constant - keops_lse(z, z).mean()


# Sizes


def _case(rows: int, dim: int, *, columns: int = 0, scale: float = 10.0, rows_name: str = "N") -> Case:
    shown = 2 * rows if rows_name == "2B" else rows
    name = f"{rows_name}={shown}" + (f" Q={columns}" if columns else "") + f" D={dim}"
    return Case(name + ("" if scale == 10 else f" scale={scale:g}"), rows, dim, columns, scale)


NT_XENT = Operation(
    name="nt_xent",
    # The last case has a temperature of 0.02: its scores are not bounded, so the kernel uses a running maximum.
    cases=(
        *(_case(2**power, 128, rows_name="2B") for power in range(5, 13)),
        _case(2048, 128, scale=50.0, rows_name="2B"),
    ),
    inputs=views,
    contestants={
        OURS: ours_nt_xent,
        "eager": eager_nt_xent,
        "torch.compile": compiled(eager_nt_xent),
        "lightly": lightly_nt_xent,
        "pytorch-metric-learning": metric_learning_nt_xent,
    },
    baseline="lightly",
    # The triangle of products is formed twice (N^2 D each). In the backward pass each tile contributes to both sides.
    flops=lambda case: 4 * (2 * case.rows) ** 2 * case.dim,
)
INFO_NCE = Operation(
    name="info_nce",
    cases=(_case(256, 128), _case(1024, 128), _case(4096, 128)),
    inputs=views,
    contestants={
        OURS: ours_info_nce,
        "eager": eager_info_nce,
        "torch.compile": compiled(eager_info_nce),
        "info-nce-pytorch": info_nce_pytorch,
        "pykeops": keops_info_nce,
        "inf-cl": inf_cl_info_nce,
    },
    baseline="info-nce-pytorch",
)
INFO_NCE_QUEUE = Operation(
    name="info_nce_queue",
    cases=(_case(256, 128, columns=4096), _case(256, 128, columns=65536)),
    inputs=views_with_queue,
    contestants={
        OURS: ours_info_nce,
        "eager": eager_info_nce,
        "torch.compile": compiled(eager_info_nce),
        "lightly": lightly_queue,
        "info-nce-pytorch": info_nce_pytorch,
        "pykeops": keops_info_nce,
    },
    baseline="lightly",
)
BIDIRECTIONAL = Operation(
    name="bidirectional",
    cases=(_case(256, 512), _case(1024, 512), _case(4096, 512)),
    inputs=views,
    contestants={
        OURS: ours_bidirectional,
        "eager": eager_bidirectional,
        "torch.compile": compiled(eager_bidirectional),
        "info-nce-pytorch": info_nce_pytorch_bidirectional,
        "inf-cl": inf_cl_bidirectional,
    },
    baseline="eager",
)
VMF_ENTROPY = Operation(
    name="vmf_entropy",
    cases=(_case(1024, 128), _case(4096, 256)),
    inputs=unit_rows,
    contestants={
        OURS: ours_entropy,
        "official": official_entropy,
        "eager": eager_entropy,
        "torch.compile": compiled(official_entropy),
        "pykeops": keops_entropy,
    },
    baseline="official",
)
OPERATIONS = (NT_XENT, INFO_NCE, INFO_NCE_QUEUE, BIDIRECTIONAL, VMF_ENTROPY)
