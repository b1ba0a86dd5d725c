"""The loader's benchmark: the same views on every side, and what is made of the answers."""

import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.data import paired
from bench.data import side as data_side
from bench.peers import OURS, loaders
from fasttrain.pipelines import View


def settings(view):
    """What a view of ours and one of lightly's are compared by."""
    return {
        "size": (view.size, view.size),
        "scale": view.scale,
        "jitter": [(max(0, 1 - s), 1 + s) for s in view.jitter[:3]] + [(-view.jitter[3], view.jitter[3])],
        "jitter_p": view.jitter_p,
        "grey": view.grey,
        "flip": view.flip,
        "blur": view.blur,
        "solarize": view.solarize,
    }


def of_lightly(transform):
    """The same from lightly's composed transforms."""
    parts = {type(part).__name__: part for part in transform.transform.transforms}
    jitter = parts["RandomApply"].transforms[0]
    return {
        "size": tuple(parts["RandomResizedCrop"].size),
        "scale": tuple(parts["RandomResizedCrop"].scale),
        "jitter": [tuple(getattr(jitter, name)) for name in ("brightness", "contrast", "saturation", "hue")],
        "jitter_p": parts["RandomApply"].p,
        "grey": parts["RandomGrayscale"].p,
        "flip": parts["RandomHorizontalFlip"].p,
        "blur": parts["GaussianBlur"].prob,
        "solarize": parts["RandomSolarization"].prob if "RandomSolarization" in parts else 0.0,
    }


@pytest.mark.parametrize("case", loaders.CASES, ids=lambda case: case.folder)
def test_lightly_has_our_views(case, monkeypatch, tmp_path):
    pytest.importorskip("lightly")
    given = []
    monkeypatch.setattr(loaders, "_loaded", lambda dataset, *rest: given.append(dataset))
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    loaders.lightly(case, tmp_path, 1)
    theirs = given[0].transform.transforms
    mine = case.views()
    assert len(theirs) == mine.n_views
    for view, other in zip(mine.each, theirs, strict=True):
        ours, found = settings(view), of_lightly(other)
        assert {k: v for k, v in found.items() if k != "jitter"} == {k: v for k, v in ours.items() if k != "jitter"}
        for one, two in zip(ours["jitter"], found["jitter"], strict=True):
            assert one == pytest.approx(two)
        interpolation = {"cubic": "bicubic", "linear": "bilinear"}[mine.interpolation]
        (crop,) = (p for p in other.transform.transforms if type(p).__name__ == "RandomResizedCrop")
        assert getattr(crop.interpolation, "value", crop.interpolation) == interpolation
        assert tuple(crop.ratio) == pytest.approx(view.ratio)
        (blur,) = (p for p in other.transform.transforms if type(p).__name__ == "GaussianBlur")
        assert tuple(blur.sigmas) == View(1).blur_sigma == view.blur_sigma


@pytest.mark.parametrize("sizes", [[(32, 32)] * 3, [(40, 36), (33, 50), (41, 41)]])
@pytest.mark.parametrize("case", loaders.CASES, ids=lambda case: case.folder)
def test_kornia_makes_our_views_of_a_batch(case, sizes, monkeypatch, tmp_path):
    pytest.importorskip("kornia")
    given = []
    monkeypatch.setattr(loaders, "_loaded", lambda dataset, *rest: given.append(dataset))
    grey = (120, 120, 120)  # stays one colour whatever is drawn
    for k, size in enumerate(sizes):
        Image.new("RGB", size, grey).save(tmp_path / f"{k}.jpg", quality=100)
    loaders.kornia(case, tmp_path, 1)
    views, mine = given[0].__getitems__([0, 1, 2]), case.views()
    assert [tuple(view.shape) for view in views] == [(3, 3, view.size, view.size) for view in mine.each]
    for view, recipe in zip(views, mine.each, strict=True):
        values = view * torch.tensor(mine.std).view(-1, 1, 1) + torch.tensor(mine.mean).view(-1, 1, 1)
        bright = recipe.jitter[0]
        low, high = 120 / 255 * (1 - bright) - 0.01, 120 / 255 * (1 + bright) + 0.01
        assert low <= values.mean() <= high or recipe.solarize
        assert values.std((1, 2, 3)).max() < 0.02


def test_a_batch_of_kornia_s_is_counted_as_its_images(tmp_path):
    pytest.importorskip("kornia")
    for k in range(4):
        Image.new("RGB", (32, 32), (k, 90, 200)).save(tmp_path / f"{k}.jpg")
    assert next(loaders.kornia(loaders.CASES[0], tmp_path, 0)) == loaders.CASES[0].batch


def test_ours_runs_and_answers(tmp_path):
    for k in range(3):
        Image.new("RGB", (32, 32), (k, 90, 200)).save(tmp_path / f"{k}.jpg")
    side = data_side.Side(OURS, 0, Path(tmp_path), 1)
    try:
        answer = side.ask("1")
        held = side.ask("memory 512")
    finally:
        side.close()
    assert side.about == {"who": OURS, "threads": 1}
    assert answer["images"] > 0
    assert answer["images"] % loaders.CASES[0].batch == 0
    assert min(answer["seconds"], answer["cpu_seconds"], answer["memory_mib"]) > 0
    assert held["images"] == 512


def test_batches_that_were_ready_do_not_count():
    taken = itertools.count()
    found = data_side.speed((next(taken) and 0 for _ in range(10**9)), 0.0)
    assert found["images"] == 0
    assert next(taken) >= data_side._AHEAD


def test_memory_is_listed_twenty_times():
    assert len(data_side.memory(itertools.repeat(10), 1000)["memory_mib"]) == 20


def test_ratios_are_of_neighbours():
    def answer(images, cpu):
        return {"images": images, "seconds": 2.0, "cpu_seconds": cpu, "memory_mib": 1.0, "others_part": 0.1}

    rounds = [{OURS: answer(80, 2.0), "peer": answer(10, 2.0)}, {OURS: answer(40, 2.0), "peer": answer(10, 1.0)}]
    found = paired._summary("peer", rounds)
    assert found["ratio"] == {"min": 4.0, "median": 6.0, "max": 8.0}
    assert found["cpu_ratio"] == {"min": 2.0, "median": 5.0, "max": 8.0}
    assert found["images_per_s"]["median"] == 5.0
    assert "ratio" not in paired._summary(OURS, rounds)
