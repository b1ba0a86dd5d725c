"""The figures of an evaluation, and the notes about figures that are left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fasttrain.distributed.world import World
from fasttrain.errors import ConfigError
from fasttrain.evaluate.alignment import alignment, uniformity
from fasttrain.evaluate.cache import FeatureCache
from fasttrain.evaluate.draws import spaced
from fasttrain.evaluate.knn import knn_accuracy
from fasttrain.evaluate.protocol import LABELLED, METRICS, Protocol, augmented_view, evaluate
from fasttrain.evaluate.spectrum import lidar, rankme
from fasttrain.pipelines import Pixels, Splits
from fasttrain.pipelines.sources.base import ArraySource
from fasttrain.pretrained import Backbone, Blueprint

_SMALL = Protocol(linear_epochs=2, draws=2, lidar_images=6, lidar_views=3, ks=(1, 5))
_BLUEPRINT = Blueprint("conv_small", 8, encoders=(1,), pixels=Pixels(channels=1, mean=(0.5,), std=(0.25,)))
_UNLABELLED = {"rankme", "alpha_req", "uniformity", "lidar", "alignment"}


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Backbone(_BLUEPRINT.build(), _BLUEPRINT, "conv_small, random")


def _source(count, labelled=True, seed=0):
    labels = np.arange(count) % 3
    noise = np.random.default_rng(seed).integers(0, 80, (count, 8, 8, 1), np.uint8)
    return ArraySource((noise + (60 * labels)[:, None, None, None]).astype(np.uint8), labels if labelled else None)


def _evaluate(backbone, splits=None, protocol=_SMALL):
    splits = splits or Splits("noise", _source(60), _source(30, seed=1))
    cache = FeatureCache(backbone.network, torch.device("cpu"), World(0, 1, 0, 1), None, batch=8, threads=1)
    notes = []
    return evaluate(backbone, splits, cache, protocol, size=8, note=notes.append), cache, notes


def test_evaluate_measures_clean_and_augmented_features(backbone):
    splits = Splits("noise", _source(60), _source(30, seed=1))
    figures, cache, _ = _evaluate(backbone, splits)
    assert cache.extracted == 60 + 30 + 6
    assert set(figures["linear"]) == {"top1", "top5", "balanced", "lr", "epochs"}
    assert set(figures["logistic"]) == {"top1", "top5", "balanced", "penalty"}
    assert [(few["fraction"], few["images"], few["draws"]) for few in figures["few_shot"]] == [
        (0.01, 3, 2),
        (0.1, 6, 2),
    ]
    assert (figures["lidar_images"], figures["lidar_views"], figures["spectrum_images"]) == (6, 3, 60)

    def pixels(source):  # 8 x 8 images need neither crop nor resizing
        return (torch.tensor(source.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25

    with torch.no_grad():
        train, val = backbone.network(pixels(splits.train)), backbone.network(pixels(splits.val))
    labels = [torch.tensor(source.labels) for source in (splits.train, splits.val)]
    assert set(figures["knn"]) == {"1", "5"}
    assert 0.5 < figures["knn"]["5"]["top1"] == knn_accuracy(train, labels[0], val, labels[1], k=5)
    assert figures["rankme"] == pytest.approx(rankme(train), rel=1e-4)
    assert figures["uniformity"] == pytest.approx(uniformity(train), abs=1e-4)
    few = ArraySource(splits.train.images[::10])
    views = cache.views(few, augmented_view(_BLUEPRINT.recipe, 8, 3)).features
    assert figures["lidar"] == pytest.approx(lidar(views))
    assert figures["alignment"] == pytest.approx(alignment(views))


def test_spaced_images_are_from_the_whole_data():
    few = spaced(_source(59), 30)
    assert [len(few), few.describe(0), few.describe(29)] == [30, "array 0", "array 57"]
    assert len(spaced(_source(5), 30)) == 5


@pytest.mark.parametrize(
    ("splits", "missing"),
    [
        (Splits("n", _source(20, labelled=False), _source(10)), "labels (class sub-folders)"),
        (Splits("n", _source(20), None), "held-out images (--val_path)"),
        (Splits("n", _source(20), _source(10, labelled=False)), "labels for its held-out images"),
    ],
)
def test_evaluate_without_labels_notes_the_figures_left_out(backbone, splits, missing):
    figures, cache, notes = _evaluate(backbone, splits)
    assert any(missing in note and note.endswith(", ".join(LABELLED)) for note in notes)
    assert figures.keys() >= _UNLABELLED
    assert not figures.keys() & set(LABELLED)
    assert cache.extracted == 20 + 6


def test_evaluate_of_one_image_has_no_figures(backbone):
    figures, _, notes = _evaluate(backbone, Splits("one", _source(1), None))
    assert figures == {}
    assert [note.rpartition(": ")[2] for note in notes if "one image" in note] == ["spectrum", "views"]


@pytest.mark.parametrize("name", METRICS)
def test_evaluate_of_one_metric_extracts_what_it_needs(backbone, name):
    figures, cache, notes = _evaluate(backbone, protocol=replace(_SMALL, metrics=(name,)))
    everything, _, _ = _evaluate(backbone)
    assert figures == {key: everything[key] for key in figures}
    assert len(figures) == {"spectrum": 4, "views": 4}.get(name, 1)
    assert cache.extracted == {"spectrum": 60, "views": 6}.get(name, 90)
    assert not any("left out" in note for note in notes)


def test_evaluate_refuses_nan_features(backbone):
    with torch.no_grad():
        backbone.network.layers[4].bn.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="conv_small, random"):
        _evaluate(backbone, Splits("noise", _source(20), None))


def test_augmented_view_jitters_colour_of_colour_images_only():
    (view,) = augmented_view(_BLUEPRINT.recipe, 8, 3).views
    assert (view.jitter, view.grey, view.blur, view.count) == ((0.4, 0.4, 0, 0), 0, 0, 3)
    (view,) = augmented_view(Blueprint("conv_small", 96).recipe, 96, 10).views
    assert (view.jitter, view.grey, view.blur) == ((0.4, 0.4, 0.4, 0.1), 0.2, 0.5)
    assert augmented_view(_BLUEPRINT.recipe, 8, 3).mean == (0.5,)
