"""The evaluator reads all images for k-NN, the spectrum's sample without it, and pixels only if they are compared."""

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain.config.resolve import resolve
from fasttrain.distributed.world import World
from fasttrain.evaluate import evaluator, spectrum
from fasttrain.evaluate.evaluator import Evaluator
from fasttrain.evaluate.spectrum import rankme
from fasttrain.pipelines import ArraySource, Loader, Splits

pytestmark = pytest.mark.usefixtures("one_thread")


def _source(count, labelled=True):
    images = np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(count) % 2 if labelled else None)


@pytest.fixture
def make():
    """Return a function that makes an evaluator of 11 images and 6 held-out images."""
    evaluators = []

    def make(train_labels=True, val_labels=True, val=True):
        splits = Splits("noise", _source(11, train_labels), _source(6, val_labels) if val else None)
        config = resolve("simclr", {"recipe": "cifar", "batch_size_per_gpu": 4, "num_workers": 1})
        evaluators.append(Evaluator(splits, config, torch.device("cpu"), World(0, 1, 0, 1)))
        return evaluators[-1]

    yield make
    for one in evaluators:
        one.close()


class _Counted(nn.Flatten):
    seen, factor = 0, 1.0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x) * self.factor


_NO_KNN = [{"train_labels": False}, {"val_labels": False}, {"val": False}]


@pytest.mark.parametrize("data", _NO_KNN)
def test_pixels_without_knn_reads_nothing(make, monkeypatch, data):
    monkeypatch.setattr(evaluator, "extract", lambda *_, **__: pytest.fail("read"))
    assert make(**data).pixels() is None


def test_pixels_above_the_limit_are_not_read(make, monkeypatch):
    """ImageNet's pixels took 47 GB."""
    monkeypatch.setattr(evaluator, "_PIXEL_BYTES", 11 * 32 * 32 * 3 * 4)
    assert make().pixels() is not None
    monkeypatch.setattr(evaluator, "_PIXEL_BYTES", 11 * 32 * 32 * 3 * 4 - 1)
    monkeypatch.setattr(evaluator, "extract", lambda *_, **__: pytest.fail("read"))
    assert make().pixels() is None


def test_pixels_takes_no_spectrum_and_closes_its_loaders(make, monkeypatch):
    closed, close = [], Loader.close
    monkeypatch.setattr(Loader, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr(evaluator, "rankme", lambda _: pytest.fail("a spectrum"))
    assert make().pixels() * 6 in range(7)
    assert [len(loader.source) for loader in closed] == [11, 6]


@pytest.mark.parametrize("data", _NO_KNN)
def test_backbone_without_knn_reads_the_spectrum_s_sample(make, monkeypatch, data):
    network, seen = _Counted(), []
    assert make().backbone(nn.Flatten()).knn_top1 is not None
    monkeypatch.setattr(spectrum, "SPECTRUM_ROWS", 4)
    monkeypatch.setattr(evaluator, "rankme", lambda rows: seen.append(rows) or rankme(rows))
    evaluation = make(**data).backbone(network)
    assert evaluation.knn_top1 is None
    assert network.seen == 4
    assert evaluation.rankme == make().backbone(nn.Flatten()).rankme  # takes every third row
    assert torch.equal(*seen)


def test_backbone_with_nan_features_is_not_finite(make):
    network = _Counted()
    network.factor = float("nan")
    assert not make().backbone(network).finite
