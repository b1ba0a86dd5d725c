"""Seconds of a run in which no step runs: k-NN evaluations, and the copies of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config.resolve import Config
from ..methods import Method
from ..pipelines import sides
from .hardware import Cluster
from .ledger import Ledger
from .memory import Part
from .trace import drop_values

_STORED = ("parameters", "teacher", "buffers", "optimizer")
"""Parts of the memory that a rank writes to a checkpoint."""


@dataclass(frozen=True)
class Pauses:
    """Seconds of the whole run."""

    evaluation: float
    """Features for k-NN, by the untrained network and after every ``--knn_every`` epochs, in fp32."""
    checkpoints: float
    """Copies of checkpoints to the host. They are written while the run continues."""

    @property
    def total(self) -> float:
        """All pauses."""
        return self.evaluation + self.checkpoints


def evaluation_time(method: Method, config: Config, cluster: Cluster, images: int) -> float:
    """Return the seconds of a k-NN evaluation: the forward passes of a rank's part of the images."""
    t = config.train
    network = copy.deepcopy(method.backbone).eval()
    height, width = sides(config.views.views[0].size)
    with FakeTensorMode(), torch.no_grad(), Ledger(()) as ledger:
        drop_values(network)
        network(torch.empty(t.batch_size_per_gpu, config.views.channels, height, width))
    seconds = max(
        sum(cluster.roofline(work.flops, work.bytes, "fp32") for work in ledger.work), cluster.host * ledger.calls
    )
    used = min(images, t.knn_train_images) + t.knn_val_images
    return float(seconds * used / (t.batch_size_per_gpu * cluster.world))


def pauses(evaluation: float, memory: Sequence[Part], config: Config, cluster: Cluster, steps: int) -> Pauses:
    """Return the pauses of a run. ``evaluation`` is the seconds of one k-NN, and ``memory`` the parts of a rank."""
    t = config.train
    evaluations = 2 + (t.epochs - 1) // t.knn_every if t.knn_every else 0
    every = t.saveckp_freq_steps
    checkpoints = t.epochs + (steps // every if every else 0)
    size = sum(part.update for part in memory if part.name in _STORED)
    return Pauses(evaluations * evaluation, checkpoints * size / cluster.copy)
