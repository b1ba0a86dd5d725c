"""The linear probe: a linear classifier on frozen features by SGD. Its learning rate is chosen on training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .draws import held_out
from .logistic import Classifier

_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class Probe:
    """Accuracy of a linear probe on the held-out images, and the learning rate that was chosen without them."""

    top1: float
    top5: float
    balanced: float
    lr: float
    epochs: int


def linear_probe(
    rows: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    epochs: int = 100,
    rates: Sequence[float] = _RATES,
    batch: int = 256,
    seed: int = 0,
) -> Probe:
    """Train a classifier on features [N, D] with SGD: momentum 0.9, batches of 256, cosine to 0, no weight decay.

    All learning rates are tried at once on nine tenths of the training images. The rate with the best accuracy on the
    last tenth trains on all of them. The queries [M, D] are used once, at the end.

    Protocols of others, for comparison. DINO (``eval_linear.py``): 100 epochs at 0.001 x batch / 256 with this cosine,
    on the concatenated [CLS] tokens of a ViT-S's last four blocks; it reports the best epoch on the validation set.
    MoCo v1 and v2: 100 epochs at 30, divided by 10 at epochs 60 and 80, on a ResNet's pooled features. Both use random
    crops and flips. Here the features of clean images are cached, so a probe takes seconds. Nothing is chosen on the
    reported images. The default rates include both learning rates.
    """
    classes = int(torch.cat([labels, query_labels]).max()) + 1
    fitted, tuning = held_out(labels, seed=seed)
    tried = train(rows[fitted], labels[fitted], rates, classes=classes, epochs=epochs, batch=batch, seed=seed)
    top1 = [c.accuracy(rows[tuning], labels[tuning]).top1 if c.weight.isfinite().all() else -1 for c in tried]
    best = rates[max(range(len(rates)), key=lambda i: (top1[i], -rates[i]))]
    (final,) = train(rows, labels, [best], classes=classes, epochs=epochs, batch=batch, seed=seed)
    accuracy = final.accuracy(queries, query_labels)
    return Probe(accuracy.top1, accuracy.top5, accuracy.balanced, best, epochs)


def train(
    rows: Tensor, labels: Tensor, rates: Sequence[float], *, classes: int, epochs: int, batch: int, seed: int
) -> list[Classifier]:
    """Train a classifier for each of R learning rates, from zero, in one pass over the same batches.

    The weights are concatenated, so one product of a batch x [B, D] gives the scores of all R C classes. The gradient
    of the mean cross-entropy is x^T (softmax - one-hot) / B. The last batch of an epoch may be shorter.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = rows.float()
    lr = torch.tensor(rates, device=rows.device).repeat_interleave(classes)
    weight = rows.new_zeros(rows.shape[1] + 1, len(lr))
    momentum = torch.zeros_like(weight)
    steps, done = epochs * math.ceil(len(rows) / batch), 0
    ones = rows.new_ones(len(rows), 1)
    rows = torch.cat([rows, ones], 1)  # the bias
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(rows), generator=generator), batch):
            x, y = rows[chosen.to(rows.device)], labels[chosen.to(rows.device)]
            error = (x @ weight).view(len(x), len(rates), classes).softmax(-1)
            error[torch.arange(len(y), device=y.device), :, y] -= 1
            momentum.mul_(0.9).addmm_(x.T, error.flatten(1), alpha=1 / len(y))
            weight -= lr * (0.5 + 0.5 * math.cos(math.pi * done / steps)) * momentum
            done += 1
    return [Classifier(w[:-1].T, w[-1]) for w in torch.split(weight, classes, dim=1)]
