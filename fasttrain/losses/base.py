"""What the losses share: rows of unit norm, and the ranks that a loss crosses."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.backend import Backend
from ..kernels.checks import check_pair, check_rows
from ..kernels.collectives import Group, start_gather
from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single


class Loss(nn.Module):
    """A loss that runs on a ``backend`` of :mod:`fasttrain.kernels` and, if asked, on the rows of all ranks.

    With ``gather_distributed`` every rank returns the loss of its own rows (or of all), and the gradients become those
    of the global batch when the trainer averages them over the ranks, as DDP and DeepSpeed do.
    """

    def __init__(self, gather_distributed: bool, backend: Backend) -> None:
        super().__init__()
        check_distributed(gather_distributed)
        self.gather_distributed = gather_distributed
        self.backend = backend

    @property
    def group(self) -> Group | None:
        """The process group whose rows are gathered, or None if this process holds the whole batch."""
        return default_group(self.gather_distributed)


def check_distributed(gather_distributed: bool) -> None:
    """Raise ValueError if ranks are to be crossed in a torch that was built without them."""
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed=True needs torch.distributed, which this torch was built without")


def default_group(gather_distributed: bool) -> Group | None:
    """The default process group if it is wanted, started, and larger than this process."""
    if not (gather_distributed and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    return dist.group.WORLD


def gather_detached(x: Tensor, group: Group | None) -> Tensor:
    """The rows of every rank in rank order, without autograd."""
    return x.detach() if group is None else start_gather(x.detach(), group)()


def unit_rows(x: Tensor, name: str) -> Tensor:
    """``x_i / max(|x_i|, 1e-12)`` for x [N, D], formed in at least fp32 and returned in the type of x.

    Raises ValueError that names the argument if it is not floating point [N, D].
    """
    check_rows(x, name)
    return normalize_rows(at_least_single(x)).to(x.dtype)


def unit_pair(x: Tensor, y: Tensor, x_name: str, y_name: str) -> tuple[Tensor, Tensor]:
    """:func:`unit_rows` of two tensors that must have the same shape [N, D], type and device."""
    check_pair(x, y, x_name, y_name, same_rows=True)
    return unit_rows(x, x_name), unit_rows(y, y_name)
