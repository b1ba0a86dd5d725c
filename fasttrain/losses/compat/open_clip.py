"""The losses of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) with the interface of open_clip 3."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels import bidirectional_logsumexp, row_logsumexp, siglip
from ...kernels.backend import Backend
from ...kernels.checks import check_pair
from ...kernels.collectives import Group, check_equal_batches, mean_over_ranks
from ...kernels.contrastive import row_dots
from ..base import gather_detached

__all__ = ["ClipLoss", "SigLipLoss"]

_EXCHANGES = ("bidir", "shift", "reduce", "gather")


class ClipLoss(nn.Module):
    """InfoNCE from images to texts and back, like ``open_clip.loss.ClipLoss``, in nats; no logits are stored.

        l = (1 / 2B) sum_i [log sum_j exp(s <x_i, y_j>) + log sum_j exp(s <y_i, x_j>)] - (1 / B) sum_i s <x_i, y_i>

    The arguments have open_clip's meaning. With ``world_size`` above 1 the sums run over the rows of all ranks of the
    default process group. ``local_loss`` returns the loss of this rank's rows; otherwise all ranks return the loss of
    all rows. Without ``gather_with_grad`` no gradient comes from other ranks' losses: features get 1 / ``world_size``
    of the global batch's gradient, or with ``local_loss`` only the gradient of their own rows' softmax.
    ``cache_labels`` has no effect. Raise ValueError for ``use_horovod``.

    With several ranks, all of them raise ValueError if their batches differ in shape or type. A trainer whose batches
    are always equal can set ``check_batches = False``.
    """

    check_batches: bool = True

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True is not supported; leave it out and use torch.distributed")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size = rank, world_size
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of two matrices [B, D] of matching rows, a scalar; with ``output_dict`` in a dictionary.

        ``logit_scale`` is 1 / temperature, a number or a scalar with gradient. A ``logit_bias``, the same for all
        logits, has no effect. Raise ValueError for shapes or dtypes that differ.
        """
        group = dist.group.WORLD if self.world_size > 1 else None
        if self.check_batches:
            check_equal_batches("ClipLoss", group, image_features, text_features)
        check_pair(image_features, text_features, "image_features", "text_features", same_rows=True)
        x, y = image_features, text_features
        if group is None:
            rows, columns = bidirectional_logsumexp(x, y, scale=logit_scale, backend=self.backend)
            loss = (rows + columns).mean() / 2 - (logit_scale * row_dots(x, y)).mean()
        elif self.local_loss and not self.gather_with_grad:
            loss = (self._against_fixed(x, y, logit_scale, group) + self._against_fixed(y, x, logit_scale, group)) / 2
        else:
            if not self.gather_with_grad:
                x, y = (torch.lerp(z.detach(), z, 1 / self.world_size) for z in (x, y))  # scales the gradient
            both = self._over_ranks(x, y, logit_scale, group) + self._over_ranks(y, x, logit_scale, group)
            loss = both.mean() / 2 - (logit_scale * row_dots(x, y)).mean()
            if not self.local_loss:
                loss = mean_over_ranks(loss, group)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_ranks(self, x: Tensor, y: Tensor, scale: float | Tensor, group: Group) -> Tensor:
        return row_logsumexp(x, y, scale=scale, backend=self.backend, group=group, check_batches=False)

    def _against_fixed(self, x: Tensor, y: Tensor, scale: float | Tensor, group: Group) -> Tensor:
        lse = row_logsumexp(x, gather_detached(y, group), scale=scale, backend=self.backend)
        return (lse - scale * row_dots(x, y.detach())).mean()


class SigLipLoss(nn.Module):
    """The sigmoid loss of all pairs, like ``open_clip.loss.SigLipLoss``, in nats; no logits are stored.

        l = -(1 / B) sum_ij log sigmoid(l_ij (s <x_i, y_j> + b)),     l_ij = 1 for i = j, else -1

    With ``world_size`` above 1 the texts y come from all ranks of the default process group, and the mean is over this
    rank's images. The texts are gathered in one message, and get the gradients of all ranks. So ``rank``,
    ``dist_impl`` and ``cache_labels`` have no effect. Raise ValueError for an unknown ``dist_impl``.

    With several ranks, all of them raise ValueError if their batches differ in shape or type. A trainer whose batches
    are always equal can set ``check_batches = False``.
    """

    check_batches: bool = True

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl = dist_impl or _EXCHANGES[0]
        if self.dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl must be one of {', '.join(_EXCHANGES)}, got {dist_impl!r}")
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss of two matrices [B, D] of matching rows, a scalar; with ``output_dict`` in a dictionary.

        ``logit_scale`` and ``logit_bias`` are numbers or scalars with gradient. Raise ValueError for shapes or dtypes
        that differ.
        """
        group = dist.group.WORLD if self.world_size > 1 else None
        if self.check_batches:
            check_equal_batches("SigLipLoss", group, image_features, text_features)
        check_pair(image_features, text_features, "image_features", "text_features", same_rows=True)
        loss = siglip(
            image_features,
            text_features,
            scale=logit_scale,
            bias=0.0 if logit_bias is None else logit_bias,
            backend=self.backend,
            group=group,
            check_batches=False,
        )
        return {"contrastive_loss": loss} if output_dict else loss
