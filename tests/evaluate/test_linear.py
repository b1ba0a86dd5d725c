"""The probe is torch's SGD with a cosine. Its learning rate is chosen on training images only."""

import math

import pytest
import torch
from torch import nn

from fasttrain.evaluate.linear import linear_probe, train

from .blobs import blobs


def _train_with_torch(rows, labels, rate, *, epochs, batch):
    """Train one classifier with torch's own optimizer and schedule, on the same batches."""
    head = nn.Linear(rows.shape[1], 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(rows) / batch))
    generator = torch.Generator().manual_seed(3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(rows[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return head


def test_train_matches_torch_for_every_rate():
    rows, labels = blobs(100, 1)
    rates = [0.01, 0.3, 3.0]
    for rate, ours in zip(rates, train(rows, labels, rates, classes=5, epochs=4, batch=32, seed=3), strict=True):
        theirs = _train_with_torch(rows, labels, rate, epochs=4, batch=32)
        torch.testing.assert_close(ours.weight, theirs.weight.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.bias, theirs.bias.detach(), rtol=1e-4, atol=1e-4)


def test_probe_trains_the_best_rate_on_all_images():
    (rows, labels), (queries, expected) = blobs(300, 1), blobs(200, 2)
    probes = [linear_probe(rows, labels, queries, y, epochs=10, rates=[1e-9, 0.1]) for y in (expected, 4 - expected)]
    assert [probe.lr for probe in probes] == [0.1, 0.1]  # the queries do not matter
    (alone,) = train(rows, labels, [0.1], classes=5, epochs=10, batch=256, seed=0)
    assert 0.6 < probes[0].top1 == alone.accuracy(queries, expected).top1 < 1


def test_probe_ignores_a_rate_that_diverges():
    rows, labels = blobs(100, 1)
    assert linear_probe(rows * 1e18, labels, rows, labels, epochs=2, rates=[1e-30, 1e25]).lr == 1e-30


@pytest.mark.parametrize("missing", [2, 4])
def test_probe_misses_a_class_without_training_images(missing):
    rows, labels = blobs(100, 1)
    kept = labels != missing
    assert linear_probe(rows[kept], labels[kept], rows, labels, epochs=5).top1 <= 0.8
