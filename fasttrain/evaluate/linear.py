"""The linear probe: a linear classifier on frozen features by SGD, its learning rate chosen on training images."""

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
    """What a linear probe reaches on the held-out images, with the learning rate that was chosen without them."""

    top1: float
    top5: float
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
    """SGD with momentum 0.9, batches of 256 and a cosine to 0, no weight decay, on features as they are [N, D].

    All learning rates are tried at once on nine tenths of the training images; the one that does best on the last tenth
    trains on all of them, and the queries [M, D] are seen once, at the end.

    What others do, so that figures can be compared: DINO (``eval_linear.py``) trains for 100 epochs at 0.001 x batch /
    256 with this cosine, on the [CLS] tokens of a ViT-S's last four blocks side by side, and reports the best epoch on
    the validation set; MoCo v1 and v2 train for 100 epochs at 30, a tenth of it from epochs 60 and 80, on a ResNet's
    pooled features. Both see random crops and flips. Here the network's own features of the clean images are cached,
    so a probe takes seconds, and nothing is chosen on what is reported; both learning rates are among those tried.
    """
    classes = int(torch.cat([labels, query_labels]).max()) + 1
    fitted, held = held_out(labels, seed=seed)
    tried = train(rows[fitted], labels[fitted], rates, classes=classes, epochs=epochs, batch=batch, seed=seed)
    reached = [c.accuracy(rows[held], labels[held]).top1 if c.weight.isfinite().all() else -1 for c in tried]
    best = rates[max(range(len(rates)), key=lambda i: (reached[i], -rates[i]))]
    (final,) = train(rows, labels, [best], classes=classes, epochs=epochs, batch=batch, seed=seed)
    accuracy = final.accuracy(queries, query_labels)
    return Probe(accuracy.top1, accuracy.top5, best, epochs)


def train(
    rows: Tensor, labels: Tensor, rates: Sequence[float], *, classes: int, epochs: int, batch: int, seed: int
) -> list[Classifier]:
    """A classifier for each of R learning rates, from zero, all in one pass over the same batches.

    The weights lie side by side, so that a batch x [B, D] meets all R C classes in one product; the gradient of mean
    cross-entropy is x^T (softmax - one-hot) / B. The last batch of an epoch may be shorter.
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
