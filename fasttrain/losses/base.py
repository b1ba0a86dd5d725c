"""Shared by the losses: rows of unit norm, and reductions over ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.checks import check_pair, check_rows
from ..kernels.collectives import Group, check_equal_batches, start_gather
from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single


class CrossRank(nn.Module):
    """A module whose reductions may cross ranks.

    With ``gather_distributed`` it uses the default process group, if one is started and has more than one rank.
    A trainer can set ``process_group`` instead; it takes precedence.

    Before rows cross ranks, all ranks raise ValueError if their batches differ in shape or type. A trainer whose
    batches are always equal can set ``check_batches = False``, which saves an exchange between the ranks.
    """

    process_group: Group | None = None
    check_batches: bool = True

    def __init__(self, gather_distributed: bool) -> None:
        super().__init__()
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed: needs torch.distributed, which this torch was built without")
        self.gather_distributed = gather_distributed

    @property
    def group(self) -> Group | None:
        """The process group whose rows are gathered, or None if this process holds the whole batch."""
        return self.process_group or default_group(self.gather_distributed)

    def _compare_batches(self, *rows: Tensor) -> None:
        """Raise ValueError on all ranks if they have tensors of different shapes or types."""
        if self.check_batches:
            check_equal_batches(type(self).__name__, self.group, *rows)


class Loss(CrossRank):
    """A loss that runs on a ``backend`` of :mod:`fasttrain.kernels` and, if requested, on the rows of all ranks.

    With ``gather_distributed`` every rank returns the loss of its own rows (or of all rows). After the trainer averages
    the gradients over the ranks, as DDP and DeepSpeed do, they equal the global batch's.
    """

    def __init__(self, gather_distributed: bool, backend: Backend) -> None:
        super().__init__(gather_distributed)
        self.backend = backend


def default_group(gather_distributed: bool) -> Group | None:
    """Return the default process group if it is wanted, started, and has more than one rank."""
    if not (gather_distributed and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    return dist.group.WORLD


def gather_detached(x: Tensor, group: Group | None) -> Tensor:
    """Return the rows of all ranks in rank order, without autograd."""
    return x.detach() if group is None else start_gather(x.detach(), group)()


def gather_views(x: Tensor, group: Group | None) -> Tensor:
    """Return the rows of all ranks [V, ranks * B, ...] of views [V, B, ...], without autograd, by one message."""
    return gather_detached(x[None], group).transpose(0, 1).flatten(1, 2)


def unit_rows(x: Tensor, name: str) -> Tensor:
    """Return ``x_i / max(|x_i|, 1e-12)`` for x [N, D], computed in at least fp32, in the dtype of x.

    Raise ValueError, which names the argument, if x is not floating point [N, D].
    """
    check_rows(x, name)
    return normalize_rows(at_least_single(x)).to(x.dtype)


def unit_pair(x: Tensor, y: Tensor, x_name: str, y_name: str) -> tuple[Tensor, Tensor]:
    """Return :func:`unit_rows` of two tensors, which must have the same shape [N, D], dtype and device."""
    check_pair(x, y, x_name, y_name, same_rows=True)
    return unit_rows(x, x_name), unit_rows(y, y_name)


def unit_views(views: Tensor, name: str) -> Tensor:
    """Return views [V, B, D] with rows of unit norm, in at least fp32.

    Raise ValueError, which names the argument, if they are not floating point [V, B, D].
    """
    if views.ndim != 3 or not views.is_floating_point():
        raise ValueError(f"{name}: must be floating-point views [V, B, D], got {views.dtype} {tuple(views.shape)}")
    return normalize_rows(at_least_single(views))


def other_pairs(queries: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return every view of ``queries`` [S, B, D] with every other view of ``targets`` [T, B, D].

    View i of both is the same view of the image and is not paired with itself. Raise ValueError if there is no pair.
    """
    pairs = [(query, target) for j, target in enumerate(targets) for i, query in enumerate(queries) if i != j]
    if not pairs:
        raise ValueError(f"at least two views are needed, got {len(queries)} and {len(targets)}")
    return pairs
