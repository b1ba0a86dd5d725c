"""What the evaluator reads: all images for k-NN, without it those of the spectrum; and pixels only where they count."""

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
def made():
    """Makes evaluators of 11 images and 6 held out."""
    every = []

    def make(train_labels=True, val_labels=True, val=True):
        splits = Splits("noise", _source(11, train_labels), _source(6, val_labels) if val else None)
        config = resolve("simclr", {"recipe": "cifar", "batch_size_per_gpu": 4, "num_workers": 1})
        every.append(Evaluator(splits, config, torch.device("cpu"), World(0, 1, 0, 1)))
        return every[-1]

    yield make
    for one in every:
        one.close()


class _Counted(nn.Flatten):
    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


_NO_KNN = [{"train_labels": False}, {"val_labels": False}, {"val": False}]


@pytest.mark.parametrize("without", _NO_KNN)
def test_pixels_are_not_read_where_there_is_no_knn(made, monkeypatch, without):
    """Every image was once read, and what was found thrown away."""
    monkeypatch.setattr(evaluator, "extract", lambda *_, **__: pytest.fail("read"))
    assert made(**without).pixels() is None


def test_too_many_pixels_are_not_read(made, monkeypatch):
    """Those of ImageNet took 47 GB."""
    monkeypatch.setattr(evaluator, "_PIXEL_BYTES", 11 * 32 * 32 * 3 * 4)
    assert made().pixels() is not None
    monkeypatch.setattr(evaluator, "_PIXEL_BYTES", 11 * 32 * 32 * 3 * 4 - 1)
    monkeypatch.setattr(evaluator, "extract", lambda *_, **__: pytest.fail("read"))
    assert made().pixels() is None


def test_of_pixels_no_spectrum_is_taken_and_no_loader_stays(made, monkeypatch):
    closed, close = [], Loader.close
    monkeypatch.setattr(Loader, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr(evaluator, "rankme", lambda _: pytest.fail("a spectrum"))
    assert made().pixels() * 6 in range(7)
    assert [len(loader.source) for loader in closed] == [11, 6]


@pytest.mark.parametrize("without", _NO_KNN)
def test_without_knn_the_network_sees_the_rows_of_the_spectrum_alone(made, monkeypatch, without):
    of_all, network = made().backbone(nn.Flatten()), _Counted()
    assert of_all.knn_top1 is not None
    monkeypatch.setattr(spectrum, "SPECTRUM_ROWS", 4)
    seen = []
    monkeypatch.setattr(evaluator, "rankme", lambda rows: seen.append(rows) or rankme(rows))
    found = made(**without).backbone(network)
    assert found.knn_top1 is None
    assert network.seen == 4
    with_knn = made().backbone(nn.Flatten())  # takes every third row of all of them
    assert found.rankme == with_knn.rankme
    assert torch.equal(*seen)


def test_features_that_are_not_numbers(made):
    class _Diverged(nn.Flatten):
        def forward(self, x):
            return super().forward(x) * float("nan")

    assert not made().backbone(_Diverged()).finite
