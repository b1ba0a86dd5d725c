"""DeepCluster v2: Deep Clustering for Unsupervised Learning of Visual Features, as SwAV's authors renewed it.

(arXiv 1807.05520; arXiv 2006.09882, appendix D)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..flags import flag
from ..kernels import prototype_entropy, row_logsumexp
from ..kernels.collectives import mean_over_ranks
from ..losses import Bound
from ..losses.base import gather_detached
from ..models.heads import projection_mlp
from .base import Branch, Method, Network, Objective, Step, Task, slice_views, width_of
from .kmeans import spherical_kmeans

_UNSEEN = -100  # of an image without a row in the memory; cross-entropy's own number for "ignore"


@dataclass(frozen=True)
class DeepClusterSettings:
    """DeepCluster v2's own settings, as in its official code for ResNet-50."""

    nmb_prototypes: int = flag(3000, "clusters of each head", least=2)
    cluster_heads: int = flag(3, "clusterings made every epoch", least=1)
    kmeans_iterations: int = flag(10, "iterations of spherical k-means", least=1)
    hidden_dim: int = flag(2048, "width of the projection head's hidden layer", least=1)
    out_dim: int = flag(128, "dimension of the projection", least=1)
    temperature: float = flag(0.1, "temperature of the predictions", above=0)


class DeepCluster(Method):
    """Predict an image's cluster of the last epoch in every view; the twin adds the entropy of the predictions.

    The memory holds the latest projections of every image from an epoch before, one row a global view (an image that an
    epoch leaves out keeps its row; the authors ignore it for an epoch). Clusterings take the global views in turn. The
    centroids are the prototypes and are not trained.
    """

    Settings = DeepClusterSettings
    settings: DeepClusterSettings
    zero_init_residual = False
    global_views_needed = 1
    image_memories = MappingProxyType({"memory": 1})

    memory: Tensor
    centroids: Tensor
    assignments: Tensor

    def __init__(self, network: Network, settings: DeepClusterSettings, task: Task) -> None:
        super().__init__(settings, task)
        seen = task.images // task.batch * task.batch  # an epoch leaves out the last images that fill no batch
        if settings.nmb_prototypes > seen:
            raise ValueError(
                f"--nmb_prototypes {settings.nmb_prototypes} is more than the {seen} images of an epoch; "
                "use fewer clusters"
            )
        backbone = network(task.views.channels)
        self.student = Branch(backbone, projection_mlp((width_of(backbone), settings.hidden_dim, settings.out_dim)))
        heads, out = settings.cluster_heads, settings.out_dim
        self.register_buffer("memory", torch.zeros(self.n_global, task.images, out))
        self.register_buffer("centroids", torch.zeros(heads, settings.nmb_prototypes, out))
        self.register_buffer("assignments", torch.full((heads, task.images), _UNSEEN))

    def forward(self, views: Sequence[Tensor], step: Step, indices: Tensor) -> Objective:
        """Mean over heads and views of the cross-entropy with the cluster; the twin's less H(mean prediction)."""
        z = self.student(views)
        self.remember(z[: self.n_global], indices)
        rows = z.flatten(0, 1)
        targets = self.assignments[:, indices].repeat(1, len(z))
        reconstruction = torch.stack(
            [self._cross_entropy(rows, c, t) for c, t in zip(self.centroids, targets, strict=True)]
        ).mean()
        entropy = self._entropy(rows) if self.entropy or step.measure else None
        loss = reconstruction - entropy if self.entropy and entropy is not None else reconstruction
        if not step.measure or entropy is None:
            terms = {} if entropy is None else {"entropy": entropy.detach(), "reconstruction": reconstruction.detach()}
            return Objective(loss, terms=terms)
        reported = mean_over_ranks(reconstruction.detach(), self.group)
        bound = Bound(entropy.detach(), math.log(self.settings.nmb_prototypes), reported)
        return Objective(loss, bound, rows.detach())

    def _entropy(self, rows: Tensor) -> Tensor:
        """H(mean prediction) of all views and ranks, mean over heads."""
        temp = self.settings.temperature
        marginals = [prototype_entropy(rows, c, temp=temp, group=self.group)[0] for c in self.centroids]
        return torch.stack(marginals).mean()

    def _cross_entropy(self, rows: Tensor, centroids: Tensor, targets: Tensor) -> Tensor:
        """Mean of ``lse_k(<z, c_k> / temp) - <z, c_target> / temp`` over the rows that have a target."""
        scale = 1 / self.settings.temperature
        known = targets != _UNSEEN
        lse = row_logsumexp(rows, centroids, scale=scale, unit_norm=True)
        dots = (rows * centroids[targets.clamp_min(0)]).sum(1)
        return ((lse - scale * dots) * known).sum() / known.sum().clamp_min(1)

    @property
    def needs_first_pass(self) -> bool:
        """The first clustering needs every image's projection."""
        return True

    @torch.no_grad()
    def first_pass(self, views: Sequence[Tensor], indices: Tensor) -> None:
        """Fill the memory."""
        crops = [view for group in slice_views(views, 0, self.n_global) for view in group]
        self.remember(torch.cat([self.student([crop[None]]) for crop in crops]), indices)

    @torch.no_grad()
    def remember(self, projections: Tensor, indices: Tensor) -> None:
        """Write all ranks' projections [n_global, B, D] of the images ``indices`` [B] into the memory."""
        rows = torch.stack([gather_detached(view, self.group) for view in projections])
        self.memory.index_copy_(1, gather_detached(indices, self.group), rows)

    @torch.no_grad()
    def start_epoch(self) -> None:
        """Cluster the memory anew, once a head."""
        for head in range(self.settings.cluster_heads):
            rows = self.memory[head % self.n_global]
            seen = rows.square().sum(1) > 0
            centroids, found = spherical_kmeans(
                rows[seen], self.settings.nmb_prototypes, iterations=self.settings.kmeans_iterations, group=self.group
            )
            self.centroids[head] = centroids
            self.assignments[head].fill_(_UNSEEN)[seen] = found
