"""The probe is torch's SGD with a cosine; its learning rate is chosen on training images and nothing else."""

import math

import pytest
import torch
from torch import nn

from fasttrain.evaluate.linear import linear_probe, train
from tests.evaluate.test_logistic import _blobs


def _by_torch(rows, labels, rate, *, epochs, batch):
    """One classifier by torch's own optimizer and schedule, on the same batches."""
    head = nn.Linear(rows.shape[1], 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
    steps = epochs * math.ceil(len(rows) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(rows[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return head


def test_every_rate_trains_as_torch_trains_it_alone():
    rows, labels = _blobs(100, 1)
    rates = [0.01, 0.3, 3.0]
    found = train(rows, labels, rates, classes=5, epochs=4, batch=32, seed=3)
    for rate, ours in zip(rates, found, strict=True):
        theirs = _by_torch(rows, labels, rate, epochs=4, batch=32)
        torch.testing.assert_close(ours.weight, theirs.weight.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.bias, theirs.bias.detach(), rtol=1e-4, atol=1e-4)


def test_the_best_rate_on_training_images_is_used_on_all_of_them():
    (rows, labels), (queries, wanted) = _blobs(300, 1), _blobs(200, 2)
    found = linear_probe(rows, labels, queries, wanted, epochs=10, rates=[1e-9, 0.1])
    assert found.lr == 0.1
    (alone,) = train(rows, labels, [0.1], classes=5, epochs=10, batch=256, seed=0)
    assert found.top1 == alone.accuracy(queries, wanted).top1
    assert 0.6 < found.top1 < 1
    other = linear_probe(rows, labels, queries, (wanted + 1) % 5, epochs=10, rates=[1e-9, 0.1])
    assert other.lr == 0.1


def test_a_rate_that_diverges_loses():
    rows, labels = _blobs(100, 1)
    found = linear_probe(rows * 1e18, labels, rows, labels, epochs=2, rates=[1e-30, 1e25])
    assert found.lr == 1e-30


@pytest.mark.parametrize("missing", [2, 4])
def test_a_class_that_is_only_among_the_queries_is_a_miss(missing):
    rows, labels = _blobs(100, 1)
    kept = labels != missing
    found = linear_probe(rows[kept], labels[kept], rows, labels, epochs=5)
    assert found.top1 <= 0.8
