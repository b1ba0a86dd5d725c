"""InfoNCE with the interface of info-nce-pytorch 0.1 (arXiv 1807.03748, equation 4)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ...kernels import row_logsumexp
from ...kernels.backend import Backend
from ...kernels.checks import check_pair, check_positive
from ...kernels.contrastive import row_dots
from ...kernels.precision import at_least_single
from ..base import unit_pair, unit_rows

__all__ = ["InfoNCE", "info_nce"]

Reduction = Literal["none", "sum", "mean"]
NegativeMode = Literal["unpaired", "paired"]


class InfoNCE(nn.Module):
    """InfoNCE of queries against their positive keys, in nats. See :func:`info_nce` for the details.

    Raise ValueError for a temperature that is not positive, or an unknown reduction or negative mode.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        reduction: Reduction = "mean",
        negative_mode: NegativeMode = "unpaired",
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _check_settings(temperature, reduction, negative_mode)
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.negative_mode: NegativeMode = negative_mode
        self.backend = backend

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        """Return the loss of ``query`` and ``positive_key`` [N, D], of any norm; a scalar, or [N] for "none".

        ``negative_keys`` are [M, D], or [N, M, D] in the mode "paired". Raise ValueError for shapes or dtypes that do
        not match.
        """
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
            backend=self.backend,
        )


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return InfoNCE of ``query`` and ``positive_key`` [N, D], of any norm, in nats and at least fp32.

        l_i = log[exp(cos(q_i, k_i) / temperature) + sum_{n in N(i)} exp(cos(q_i, n) / temperature)]
              - cos(q_i, k_i) / temperature

    By default the negatives N(i) are the other positive keys. ``negative_keys`` [M, D] ("unpaired") replace them by the
    same M rows for every query, and [N, M, D] ("paired") by each query's own M rows. ``reduction`` returns all l_i [N]
    ("none"), their sum or their mean.

    Raise ValueError for shapes or dtypes that do not match, a temperature that is not positive, or an unknown reduction
    or negative mode.
    """
    _check_settings(temperature, reduction, negative_mode)
    q, k = unit_pair(query, positive_key, "query", "positive_key")
    scale = 1 / temperature
    positives = scale * row_dots(q, k)
    if negative_keys is None:
        lse = row_logsumexp(q, k, scale=scale, unit_norm=True, backend=backend)
    elif negative_mode == "unpaired":
        check_pair(query, negative_keys, "query", "negative_keys")
        negatives = unit_rows(negative_keys, "negative_keys")
        others = row_logsumexp(q, negatives, scale=scale, unit_norm=True, backend=backend)
        lse = torch.logaddexp(positives, others)
    else:
        lse = torch.logaddexp(positives, _paired_logits(q, negative_keys, scale).logsumexp(1))
    losses = lse - positives
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _paired_logits(q: Tensor, negatives: Tensor, scale: float) -> Tensor:
    """Return ``scale cos(q_i, negatives_im)`` [N, M]. Each negative is used once, so tiles would gain nothing."""
    if negatives.ndim != 3 or negatives.shape[::2] != q.shape or not negatives.shape[1]:
        raise ValueError(
            f"paired negative_keys must be [N, M, D] = ({len(q)}, M > 0, {q.shape[1]}), got {tuple(negatives.shape)}"
        )
    check_pair(q, negatives[:, 0], "query", "negative_keys")
    unit = unit_rows(negatives.flatten(0, 1), "negative_keys").view_as(negatives)
    return scale * (at_least_single(unit) * at_least_single(q)[:, None]).sum(-1)


def _check_settings(temperature: float, reduction: str, negative_mode: str) -> None:
    check_positive(temperature, "temperature")
    for name, value, known in (
        ("reduction", reduction, Reduction),
        ("negative_mode", negative_mode, NegativeMode),
    ):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}")
