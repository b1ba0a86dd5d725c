"""DeepCluster v2: Deep Clustering for Unsupervised Learning of Visual Features, as revised by SwAV's authors.

(arXiv 1807.05520; arXiv 2006.09882, appendix D)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..flags import Count, Positive, Several, flag
from ..kernels import prototype_entropy, row_logsumexp
from ..kernels.collectives import mean_over_ranks
from ..losses.base import gather_detached, gather_views
from ..models.heads import projection_mlp
from .base import Objective, PerImages, Step, Task
from .bound import PrototypeMethod
from .branch import Branch, Network, slice_views, width_of
from .kmeans import SCORES, spherical_kmeans
from .registry import register

_UNSEEN = -100  # the assignment of an image without a row in the memory; cross-entropy's usual "ignore" index


@dataclass(frozen=True)
class DeepClusterSettings:
    """DeepCluster v2's settings, as in its official code for ResNet-50."""

    nmb_prototypes: Several = flag(3000, "clusters per head")
    cluster_heads: Count = flag(3, "clusterings per epoch")
    kmeans_iterations: Count = flag(10, "iterations of spherical k-means")
    hidden_dim: Count = flag(2048, "width of the projection head's hidden layer")
    out_dim: Several = flag(128, "dimension of the projection")
    temperature: Positive = flag(0.1, "temperature of the predictions")


@register("deepcluster")
class DeepCluster(PrototypeMethod):
    """Predict an image's cluster of the last epoch in every view; the twin adds the entropy of the predictions.

    The memory holds the latest projections of every image from the previous epoch, one row per global view. An image
    that an epoch leaves out keeps its row; the authors ignore it for an epoch. Clusterings take the global views in
    turn. The centroids are the prototypes and are not trained.
    """

    Settings = DeepClusterSettings
    settings: DeepClusterSettings
    sized = MappingProxyType({"nmb_prototypes": PerImages(128, 16, 2048)})
    family = "clustering"
    zero_init_residual = False
    global_views_needed = 1
    image_memories = MappingProxyType({"memory": 1})

    memory: Tensor
    centroids: Tensor
    assignments: Tensor

    def __init__(self, network: Network, settings: DeepClusterSettings, task: Task) -> None:
        super().__init__(settings, task)
        images = task.images // task.batch * task.batch  # an epoch leaves out the last incomplete batch
        if settings.nmb_prototypes > images:
            raise ValueError(
                f"--nmb_prototypes: must be at most the {images} images of an epoch, got {settings.nmb_prototypes}. "
                "Use fewer clusters."
            )
        backbone = network(task.views.channels)
        self.student = Branch(backbone, projection_mlp((width_of(backbone), settings.hidden_dim, settings.out_dim)))
        heads, out = settings.cluster_heads, settings.out_dim
        self.register_buffer("memory", torch.zeros(self.n_global, task.images, out))
        self.register_buffer("centroids", torch.zeros(heads, settings.nmb_prototypes, out))
        self.register_buffer("assignments", torch.full((heads, task.images), _UNSEEN))

    @classmethod
    def bytes_between_epochs(cls, settings: Any, images: int) -> int:
        """Return the bytes of k-means: a copy of the memory's rows, and a chunk of scores."""
        return 4 * (images * int(settings.out_dim) + SCORES)

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Return the mean over heads and views of the cross-entropy with the cluster, or the twin's objective."""
        z = self.student(views)
        self.remember(z[: self.n_global], indices)
        rows = z.flatten(0, 1)
        targets = self.assignments[:, indices].repeat(1, len(z))
        reconstruction = torch.stack(
            [self._cross_entropy(rows, c, t) for c, t in zip(self.centroids, targets, strict=True)]
        ).mean()
        entropy = self._entropy(rows) if self.entropy or step.measure else None
        objective = self.prototype_objective(reconstruction, entropy, rows, step)
        if objective.bound is None:
            return objective
        # Ranks may have different numbers of rows with a target, so the bound takes the mean over ranks.
        reported = mean_over_ranks(reconstruction.detach(), self.group)
        return objective._replace(bound=replace(objective.bound, reconstruction=reported))

    def _entropy(self, rows: Tensor) -> Tensor:
        """Return H(mean prediction) over all views and ranks, mean over heads."""
        temp = self.settings.temperature
        entropies, _ = prototype_entropy(rows, self.centroids, temp=temp, group=self.group, check_batches=False)
        return entropies.mean()

    def _cross_entropy(self, rows: Tensor, centroids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of ``lse_k(<z, c_k> / temp) - <z, c_target> / temp`` over the rows with a target."""
        scale = 1 / self.settings.temperature
        known = targets != _UNSEEN
        lse = row_logsumexp(rows, centroids, scale=scale, unit_norm=True)
        dots = (rows * centroids[targets.clamp_min(0)]).sum(1)
        return ((lse - scale * dots) * known).sum() / known.sum().clamp_min(1)

    @property
    def needs_first_pass(self) -> bool:
        """Whether the first clustering needs every image's projection."""
        return True

    @torch.no_grad()
    def first_pass(self, views: Sequence[Tensor], indices: Tensor) -> None:
        """Fill the memory."""
        crops = [view for group in slice_views(views, 0, self.n_global) for view in group]
        self.remember(torch.cat([self.student([crop[None]]) for crop in crops]), indices)

    @torch.no_grad()
    def remember(self, projections: Tensor, indices: Tensor) -> None:
        """Write all ranks' projections [n_global, B, D] of the images ``indices`` [B] into the memory."""
        rows = gather_views(projections, self.group)
        self.memory.index_copy_(1, gather_detached(indices, self.group), rows)

    @torch.no_grad()
    def start_epoch(self) -> None:
        """Cluster the memory again, once per head."""
        for head in range(self.settings.cluster_heads):
            rows = self.memory[head % self.n_global]
            seen = rows.square().sum(1) > 0
            centroids, labels = spherical_kmeans(
                rows[seen], self.settings.nmb_prototypes, iterations=self.settings.kmeans_iterations, group=self.group
            )
            self.centroids[head] = centroids
            self.assignments[head].fill_(_UNSEEN)[seen] = labels
