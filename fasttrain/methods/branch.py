"""A backbone with its heads and prototypes, and helpers for lists of views grouped by resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..kernels.normalize import normalize_rows
from ..kernels.precision import at_least_single
from ..models.heads import Prototypes

Network = Callable[[int], nn.Module]
"""Builds a backbone for a number of input channels; its ``num_features`` is the width of its output."""


class Branch(nn.Module):
    """A backbone with a projection head and, for methods on prototypes, a set of prototypes.

    ``head`` and ``prototypes`` may be mappings by name, for methods with several (a [CLS] and a patch head, say).

    BatchNorm sees all views of a resolution together in the backbone, and all views in the head. With ``views_apart``
    it sees one view at a time, as in the official code of some methods.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module | Mapping[str, nn.Module],
        prototypes: Prototypes | Mapping[str, Prototypes] | None = None,
        *,
        views_apart: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.ModuleDict(head) if isinstance(head, Mapping) else head
        self.views_apart = views_apart
        if prototypes is not None:
            self.prototypes = nn.ModuleDict(prototypes) if isinstance(prototypes, Mapping) else prototypes

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Return the projections [V, B, D] with unit-norm rows, in fp32, of views grouped by resolution.

        Each group is [V_g, B, C, H, W].
        """
        return normalize_rows(self.projections(views))

    def projections(self, views: Sequence[Tensor], head: str | None = None) -> Tensor:
        """Return the projections [V, B, D] as the head returns them, in fp32; ``head`` names one of several."""
        if self.views_apart:
            return torch.cat([self._project([view[None]], head) for group in views for view in group])
        return self._project(views, head)

    def _project(self, views: Sequence[Tensor], name: str | None) -> Tensor:
        """Run the backbone once per resolution and the head once over all views."""
        batch = views[0].shape[1]
        features = torch.cat([self.backbone(group.flatten(0, 1)) for group in views])
        head = self.head[name] if name is not None and isinstance(self.head, nn.ModuleDict) else self.head
        projected = at_least_single(head(features))
        return projected.view(-1, batch, projected.shape[1])


def slice_views(views: Sequence[Tensor], start: int, stop: int | None = None) -> list[Tensor]:
    """Return the views ``start`` to ``stop - 1``, by default up to the last, still grouped by resolution."""
    chosen: list[Tensor] = []
    for group in views:
        part = group[max(start, 0) : None if stop is None else max(stop, 0)]
        if len(part):
            chosen.append(part)
        start, stop = start - len(group), None if stop is None else stop - len(group)
    return chosen


def predict(predictor: nn.Module, projections: Tensor) -> Tensor:
    """Return the predictor's outputs for projections [V, B, D], one view at a time, in fp32."""
    return at_least_single(torch.stack([predictor(view) for view in projections]))


def width_of(backbone: nn.Module) -> int:
    """Return the number of features that a backbone returns."""
    return int(backbone.num_features)  # type: ignore[arg-type]
