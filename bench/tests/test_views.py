"""Test our trainer with lightly's views: equal settings, images, order and layout."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightly")

from bench.evidence import views
from bench.trainer.sides.lightly_views import LightlySimCLR
from bench.trainer.sides.peer import Peer, transform
from fasttrain.config.resolve import resolve
from fasttrain.pipelines import FolderSource, Loader

from .test_paired_data import assert_same_settings

RECIPE = resolve("simclr", {"recipe": "cifar", "data_path": "-"}).views


def test_lightly_transform_has_the_settings_of_the_recipe():
    assert_same_settings(RECIPE, transform("simclr", RECIPE).transforms)


@pytest.mark.parametrize("folder", ["", "train"])
def test_lightly_side_trains_on_the_training_images_only(images, folder):
    """Regression: with a folder of train/ and val/ it used both, and so made a quarter more steps."""
    flags = {"recipe": "cifar", "data_path": str(images / folder), "batch_size_per_gpu": 8}
    side = Peer(resolve("simclr", flags))
    assert (len(side.loader.dataset), len(side.loader)) == (32, 4)


@pytest.fixture
def source(tmp_path):
    for k in range(24):
        coarse = np.random.default_rng(k).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = tmp_path / f"{k % 2}/{k:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((32, 32)).save(path)
    return FolderSource(tmp_path)


def _epoch(kind, source, number):
    loader = kind(source, RECIPE, 8, threads=1, seed=5)
    batches = list(loader.epoch(number))
    loader.close()
    return batches


def test_batches_differ_only_in_the_pixels(source):
    ours, theirs = (_epoch(kind, source, 3) for kind in (Loader, LightlySimCLR))
    assert len(ours) == len(theirs) == 3
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.labels, two.labels)
        (own,), (other,) = one.views, two.views
        assert (own.shape, own.dtype, own.stride()) == (other.shape, other.dtype, other.stride())
        assert not torch.equal(own, other)
        assert not torch.equal(other[0], other[1])


def test_lightly_views_repeat_and_change_with_the_epoch(source):
    first, again, other = (_epoch(LightlySimCLR, source, number) for number in (0, 0, 1))
    assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].views[0], other[0].views[0])


def test_both_sides_have_the_same_flags():
    ours, theirs = views.design([4], 7, "/images")
    assert ours.command[2:] == theirs.command[4:]
    assert theirs.command[1:3] == ["-m", "bench.evidence.views"]
    assert " ".join(ours.command[2:]).startswith("--method simclr --seed 4 --recipe cifar --epochs 7")
