"""Ours and lightly's views in one trainer: the same parameters, images, order and layout, and what is made of it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightly")
from bench.evidence import views
from bench.trainer.sides.lightly_views import LightlySimCLR
from bench.trainer.sides.peer import Peer, transform
from fasttrain.config.settings import resolve
from fasttrain.pipelines import FolderSource, Loader

from .test_paired_data import of_lightly, settings

RECIPE = resolve("simclr", {"recipe": "cifar", "data_path": "-"}).views


def test_lightly_s_transform_has_the_recipe_s_parameters():
    theirs = transform("simclr", RECIPE).transforms
    assert len(theirs) == RECIPE.n_views == 2
    for view, other in zip(RECIPE.each, theirs, strict=True):
        ours, found = settings(view), of_lightly(other)
        for one, two in zip(ours.pop("jitter"), found.pop("jitter"), strict=True):
            assert one == pytest.approx(two)
        assert found == ours
        parts = {type(part).__name__: part for part in other.transform.transforms}
        crop, last = parts["RandomResizedCrop"], parts["Normalize"]
        assert tuple(crop.ratio) == pytest.approx(view.ratio)
        interpolation = getattr(crop.interpolation, "value", crop.interpolation)
        assert (interpolation, crop.antialias, RECIPE.interpolation) == ("bilinear", True, "linear")
        assert (tuple(last.mean), tuple(last.std)) == (RECIPE.mean, RECIPE.std)
        assert parts["RandomVerticalFlip"].p == 0
        known = {"RandomResizedCrop", "RandomHorizontalFlip", "RandomVerticalFlip", "RandomApply", "RandomGrayscale"}
        rest = set(parts) - known - {"GaussianBlur", "ToTensor", "Normalize"}
        assert all(parts[name].prob == 0 for name in rest)  # the rotation


@pytest.mark.parametrize("folder", ["", "train"])
def test_lightly_s_side_trains_on_the_training_images_alone(images, folder):
    """Of a folder with train/ and val/ it took both: a quarter more steps, and looked better for it."""
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


def epoch(kind, source, number, **options):
    loader = kind(source, RECIPE, 8, threads=1, **options)
    found = list(loader.epoch(number))
    loader.close()
    return found


def test_batches_differ_in_nothing_but_the_pixels(source):
    ours, theirs = (epoch(kind, source, 3, seed=5) for kind in (Loader, LightlySimCLR))
    assert len(ours) == len(theirs) == 3
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.labels, two.labels)
        (mine,), (other,) = one.views, two.views
        assert (mine.shape, mine.dtype, mine.stride()) == (other.shape, other.dtype, other.stride())
        assert not torch.equal(mine, other)
        assert not torch.equal(other[0], other[1])


def test_lightly_s_views_are_the_same_again_and_others_in_another_epoch(source):
    first, again, other = (epoch(LightlySimCLR, source, number) for number in (0, 0, 1))
    assert all(torch.equal(a.views[0], b.views[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0].views[0], other[0].views[0])


def test_a_view_of_a_plain_image_is_that_image(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (90, 90, 90)).save(file, "PNG")
    for k in range(8):
        (tmp_path / f"{k}.png").write_bytes(file.getvalue())
    (batch,) = epoch(LightlySimCLR, FolderSource(tmp_path), 0)
    assert batch.labels is None
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (RECIPE.mean, RECIPE.std))
    values = (batch.views[0] * std + mean) * 255
    assert 90 * 0.6 - 2 <= values.min() <= values.max() <= 90 * 1.4 + 2
    assert values.std((2, 3, 4)).max() < 0.5


def test_both_sides_are_one_command():
    ours, theirs = views.design([4], 7, "/images")
    assert ours.command[2:] == theirs.command[4:]
    assert theirs.command[1:3] == ["-m", "bench.evidence.views"]
    assert " ".join(ours.command[2:]).startswith("--method simclr --seed 4 --recipe cifar --epochs 7")


def test_the_table_is_of_seeds_that_both_have():
    def row(name, seed, knn):
        return {"run": name, "seed": seed, "knn_top1": knn, "knn_top1_untrained": 0.3, "rankme": 9, "images_per_s": 1e3}

    rows = [row("simclr", 0, 0.60), row("simclr lightly's views", 0, 0.59), row("simclr", 1, 0.62)]
    assert views.report(rows).count("seed") == 1
    lines = views.report([*rows, row("simclr lightly's views", 1, 0.65)]).splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:]] == ["+1.00", "-3.00", "-1.00"]
