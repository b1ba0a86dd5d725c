"""What is measured of which images, and what is said of what cannot be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fasttrain.distributed.world import World
from fasttrain.errors import ConfigError
from fasttrain.evaluate import protocol
from fasttrain.evaluate.alignment import alignment, uniformity
from fasttrain.evaluate.cache import FeatureCache
from fasttrain.evaluate.knn import knn_accuracy
from fasttrain.evaluate.protocol import METRICS, Protocol, augmented_view, evaluate
from fasttrain.evaluate.spectrum import lidar, rankme
from fasttrain.pipelines import Pixels, Splits
from fasttrain.pipelines.sources.base import ArraySource
from fasttrain.pretrained import Backbone, Blueprint

_SMALL = Protocol(linear_epochs=2, draws=2, lidar_images=6, lidar_views=3, ks=(1, 5))
_BLUEPRINT = Blueprint("conv_small", 8, encoders=(1,), pixels=Pixels(channels=1, mean=(0.5,), std=(0.25,)))


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Backbone(_BLUEPRINT.build(), _BLUEPRINT, "conv_small, random")


def _source(count, labelled=True, seed=0):
    labels = np.arange(count) % 3
    images = (
        np.random.default_rng(seed).integers(0, 80, (count, 8, 8, 1), np.uint8) + (60 * labels)[:, None, None, None]
    )
    return ArraySource(images.astype(np.uint8), labels if labelled else None)


def _evaluate(backbone, splits, protocol=_SMALL, world=None):
    cache = FeatureCache(backbone.network, torch.device("cpu"), world or World(0, 1, 0, 1), None, batch=8, threads=1)
    notes = []
    return evaluate(backbone, splits, cache, protocol, size=8, note=notes.append), cache, notes


def test_everything_is_measured(backbone):
    figures, cache, _ = _evaluate(backbone, Splits("noise", _source(60), _source(30, seed=1)))
    assert set(figures["knn"]) == {"1", "5"}
    assert figures["knn"]["5"]["top1"] > 0.5
    assert set(figures["linear"]) == {"top1", "top5", "lr", "epochs"}
    assert set(figures["logistic"]) == {"top1", "top5", "penalty"}
    assert [(few["fraction"], few["images"], few["draws"]) for few in figures["few_shot"]] == [
        (0.01, 3, 2),
        (0.1, 6, 2),
    ]
    assert {"rankme", "alpha_req", "uniformity", "lidar", "alignment"} <= figures.keys()
    assert (figures["lidar_images"], figures["lidar_views"], figures["spectrum_images"]) == (6, 3, 60)
    assert cache.extracted == 60 + 30 + 6


def test_the_images_that_are_looked_at_are_spaced_over_all(backbone):
    few = protocol._spaced(_source(59), 30)
    assert [len(few), few.describe(0), few.describe(29)] == [30, "array 0", "array 57"]
    assert len(protocol._spaced(_source(5), 30)) == 5


def test_figures_are_those_of_the_clean_and_of_the_augmented_features(backbone):
    splits = Splits("noise", _source(60), _source(30, seed=1))
    figures, cache, _ = _evaluate(backbone, splits)

    def pixels(source):  # 8 x 8 images need neither crop nor resizing
        return (torch.tensor(source.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25

    with torch.no_grad():
        train, val = backbone.network(pixels(splits.train)), backbone.network(pixels(splits.val))
    labels = [torch.tensor(source.labels) for source in (splits.train, splits.val)]
    assert figures["knn"]["5"]["top1"] == knn_accuracy(train, labels[0], val, labels[1], k=5)
    assert figures["rankme"] == pytest.approx(rankme(train), rel=1e-4)
    assert figures["uniformity"] == pytest.approx(uniformity(train), abs=1e-4)
    few = ArraySource(splits.train.images[::10])
    views = cache.views(few, augmented_view(_BLUEPRINT.recipe, 8, 3)).features
    assert figures["lidar"] == pytest.approx(lidar(views))
    assert figures["alignment"] == pytest.approx(alignment(views))


@pytest.mark.parametrize(
    ("splits", "missing"),
    [
        (Splits("n", _source(20, labelled=False), _source(10)), r"labels (class sub-folders)"),
        (Splits("n", _source(20), None), "held-out images (--val_path)"),
        (Splits("n", _source(20), _source(10, labelled=False)), "labels for its held-out images"),
    ],
)
def test_without_labels_a_line_says_what_is_left_out(backbone, splits, missing):
    figures, cache, notes = _evaluate(backbone, splits)
    assert f"left out, since the data has no {missing}: knn, linear, logistic, few_shot" in notes
    assert {"rankme", "alpha_req", "uniformity", "lidar", "alignment"} <= figures.keys()
    assert not {"knn", "linear", "logistic", "few_shot"} & figures.keys()
    assert cache.extracted == 20 + 6  # what nobody needs is not extracted


def test_one_image_is_too_few_for_what_compares_images(backbone):
    figures, _, notes = _evaluate(backbone, Splits("one", _source(1), None))
    assert figures == {}
    assert [note for note in notes if "one image" in note] == [
        f"left out, since one image alone can be read: {name}" for name in ("spectrum", "views")
    ]


@pytest.mark.parametrize("name", METRICS)
def test_one_metric_alone(backbone, name):
    splits = Splits("noise", _source(60), _source(30, seed=1))
    figures, cache, notes = _evaluate(backbone, splits, replace(_SMALL, metrics=(name,)))
    everything, _, _ = _evaluate(backbone, splits)
    assert figures == {key: everything[key] for key in figures}
    assert len(figures) == {"spectrum": 4, "views": 4}.get(name, 1)
    assert cache.extracted == {"spectrum": 60, "views": 6}.get(name, 90)
    assert not any("left out" in note for note in notes)


def test_features_that_are_not_numbers_are_an_error(backbone):
    with torch.no_grad():
        backbone.network.layers[4].bn.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="conv_small, random: its features are not all numbers; choose an earlier"):
        _evaluate(backbone, Splits("noise", _source(20), None))


def test_colour_is_jittered_only_where_there_is_some():
    grey, colour = _BLUEPRINT.recipe, Blueprint("conv_small", 96).recipe
    (view,) = augmented_view(grey, 8, 3).views
    assert (view.jitter, view.grey, view.blur, view.count) == ((0.4, 0.4, 0, 0), 0, 0, 3)
    (view,) = augmented_view(colour, 96, 10).views
    assert (view.jitter, view.grey, view.blur) == ((0.4, 0.4, 0.4, 0.1), 0.2, 0.5)
    assert augmented_view(grey, 8, 3).mean == (0.5,)
