"""Test the loader's benchmark: equal views on every side, and the figures of the answers."""

import itertools

import pytest
import torch
from PIL import Image

from bench.data import paired
from bench.data import side as data_side
from bench.peers import OURS, loaders


def assert_same_settings(recipe, transforms):
    """Assert that lightly's composed transforms have the settings of a recipe's views."""
    assert len(transforms) == recipe.n_views
    for view, composed in zip(recipe.each, transforms, strict=True):
        parts = {type(part).__name__: part for part in composed.transform.transforms}
        crop, jitter = parts["RandomResizedCrop"], parts["RandomApply"].transforms[0]
        ranges = [(max(0, 1 - s), 1 + s) for s in view.jitter[:3]] + [(-view.jitter[3], view.jitter[3])]
        for name, expected in zip(("brightness", "contrast", "saturation", "hue"), ranges, strict=True):
            assert tuple(getattr(jitter, name)) == pytest.approx(expected)
        assert (tuple(crop.size), tuple(crop.scale)) == ((view.size, view.size), view.scale)
        assert tuple(crop.ratio) == pytest.approx(view.ratio)
        interpolation = {"cubic": "bicubic", "linear": "bilinear"}[recipe.interpolation]
        assert getattr(crop.interpolation, "value", crop.interpolation) == interpolation
        names = {"RandomApply": "jitter_p", "RandomGrayscale": "grey", "RandomHorizontalFlip": "flip"}
        assert {name: parts[name].p for name in names} == {name: getattr(view, key) for name, key in names.items()}
        assert parts["RandomVerticalFlip"].p == 0 if "RandomVerticalFlip" in parts else True
        assert (parts["GaussianBlur"].prob, tuple(parts["GaussianBlur"].sigmas)) == (view.blur, view.blur_sigma)
        others = {"RandomSolarization": view.solarize, "RandomRotate": 0, "RandomRotateDegrees": 0}
        assert all(parts[name].prob == chance for name, chance in others.items() if name in parts)
        assert (tuple(parts["Normalize"].mean), tuple(parts["Normalize"].std)) == (recipe.mean, recipe.std)


@pytest.fixture
def datasets(monkeypatch):
    """Return the list of data sets that a contestant gives to its DataLoader."""
    datasets = []
    monkeypatch.setattr(loaders, "_loaded", lambda dataset, *rest: datasets.append(dataset))
    return datasets


@pytest.mark.parametrize("case", loaders.CASES, ids=lambda case: case.folder)
def test_lightly_has_our_views(case, datasets, tmp_path):
    pytest.importorskip("lightly")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    loaders.lightly(case, tmp_path, 1)
    assert_same_settings(case.views(), datasets[0].transform.transforms)


@pytest.mark.parametrize("sizes", [[(32, 32)] * 3, [(40, 36), (33, 50), (41, 41)]])
@pytest.mark.parametrize("case", loaders.CASES, ids=lambda case: case.folder)
def test_kornia_makes_our_views_of_a_batch(case, sizes, datasets, tmp_path):
    """A grey image has one colour after every augmentation."""
    pytest.importorskip("kornia")
    for k, size in enumerate(sizes):
        Image.new("RGB", size, (120, 120, 120)).save(tmp_path / f"{k}.jpg", quality=100)
    loaders.kornia(case, tmp_path, 1)
    views, recipe = datasets[0].__getitems__([0, 1, 2]), case.views()
    for view, settings in zip(views, recipe.each, strict=True):
        assert tuple(view.shape) == (3, 3, settings.size, settings.size)
        values = view * torch.tensor(recipe.std).view(-1, 1, 1) + torch.tensor(recipe.mean).view(-1, 1, 1)
        low, high = (120 / 255 * (1 + sign * settings.jitter[0]) + sign * 0.01 for sign in (-1, 1))
        assert low <= values.mean() <= high or settings.solarize
        assert values.std((1, 2, 3)).max() < 0.02


@pytest.mark.parametrize("who", [OURS, "kornia"])
def test_side_answers_with_its_figures(who, tmp_path):
    if who == "kornia":
        pytest.importorskip("kornia")
    for k in range(4):
        Image.new("RGB", (32, 32), (k, 90, 200)).save(tmp_path / f"{k}.jpg")
    side = data_side.Side(who, 0, tmp_path, 1)
    try:
        answer, sizes = side.ask("0.5"), side.ask("memory 512")
    finally:
        side.close()
    assert side.about == {"who": who, "threads": 1}
    assert answer["images"] % loaders.CASES[0].batch == 0
    assert min(answer[key] for key in ("images", "seconds", "cpu_seconds", "memory_mib")) > 0
    assert (sizes["images"], len(sizes["memory_mib"])) == (512, 2)


def test_speed_ignores_batches_that_were_ready():
    batches = itertools.count()
    assert data_side.speed((next(batches) and 0 for _ in range(10**9)), 0.0)["images"] == 0
    assert next(batches) >= data_side._AHEAD


def test_ratios_are_of_the_same_round():
    def answer(images, cpu):
        return {"images": images, "seconds": 2.0, "cpu_seconds": cpu, "memory_mib": 1.0, "others_part": 0.1}

    rounds = [{OURS: answer(80, 2.0), "peer": answer(10, 2.0)}, {OURS: answer(40, 2.0), "peer": answer(10, 1.0)}]
    summary = paired._summary("peer", rounds)
    assert summary["ratio"] == {"min": 4.0, "median": 6.0, "max": 8.0}
    assert summary["cpu_ratio"] == {"min": 2.0, "median": 5.0, "max": 8.0}
    assert "ratio" not in paired._summary(OURS, rounds)
