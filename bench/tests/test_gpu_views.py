"""The views' parts of bench/gpu: what they decide and count; what they measure needs a GPU."""

import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bench.gpu import Budget, Run, checks, views
from fasttrain.pipelines import Loader, View, ViewRecipe
from tests.pipelines.photometric import stress

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_checks_reach_every_use_and_type():
    every = views.checks()
    assert len(set(map(str, every))) == len(every)
    assert {(c.use, c.dtype) for c in every} == {(use, dtype) for use in stress.USES for dtype in checks.DTYPES}


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_check_runs_interpreted(dtype):
    row = checks.run_check(views.Check("everything", dtype, 3, 9), _DEVICE)
    assert (row["status"], row["detail"]) == ("right", None)
    assert row["check"] == f"photometric: everything, {dtype}, 3 images of 9 pixels"


def test_a_wrong_kernel_is_found(monkeypatch):
    right = stress.finish
    monkeypatch.setattr(stress, "finish", lambda *given, out: (right(*given, out=out), out[0].add_(1)))
    row = checks.run_check(views.Check("everything", "fp32", 3, 9), _DEVICE)
    assert row["status"] == "wrong"


def test_views_are_held_to_the_cpus():
    files = views.jpegs(4, 40, 50)
    plain = ViewRecipe((View(32),))
    found = views.distance(plain, files, "cpu")
    assert found == {"mean_levels": 0, "worst_image_levels": 0, "beyond_16_levels": 0, "repeats": True}
    assert views.alike_failures([{"method": "dino", "fault": None, **found}]) == []


def test_views_of_other_pixels_are_a_failure(monkeypatch):
    first = views._first
    monkeypatch.setattr(
        views, "_first", lambda own, files, device: [g + (device == "cuda") for g in first(own, files, "cpu")]
    )
    found = views.distance(ViewRecipe((View(32),)), views.jpegs(4, 40, 50))
    assert found["mean_levels"] == pytest.approx(57.3, abs=0.5)  # one standard deviation, 0.225 of 255
    assert views.alike_failures([{"method": "dino", "fault": None, **found}]) == [
        f"views of dino: {found['mean_levels']} levels from the CPU in the mean"
    ]


def test_files_are_images_of_the_right_size_and_weight():
    files = views.jpegs(3, 375, 500)
    assert len(set(files)) == 3
    assert [Image.open(io.BytesIO(file)).size for file in files] == [(500, 375)] * 3
    assert all(60_000 < len(file) < 200_000 for file in files)


def test_files_are_a_source():
    loader = Loader(views.Files(views.jpegs(4, 32, 32)), ViewRecipe((View(32),)), 4)
    assert next(loader.epoch(0)).views[0].shape == (1, 4, 3, 32, 32)
    loader.close()


def test_the_roofline_is_that_of_the_bytes():
    case = views.Case("simclr", "cifar", 10, 32, 32)
    assert views.roofline_seconds(case, None) is None
    chip = SimpleNamespace(name="H100")
    assert views.roofline_seconds(case, chip) == pytest.approx(10 * 2 * 3 * 32**2 * 8 / 3.35e12)  # 5, hue 2, mean 1


def test_what_breaks_is_a_row_and_a_failure(tmp_path, monkeypatch):
    """Without a GPU every stage breaks, and says so."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(views, "CASES", (views.Case("simclr", "cifar", 4, 32, 32),))
    monkeypatch.setattr(views, "_IMAGES", 4)
    run = Run(tmp_path / "a.json", {}, Budget(100))
    rows = run.start(SimpleNamespace(name="data", until=1))
    views.data(run)
    assert [row["stage"] for row in rows] == list(views.STAGES)
    assert len(views.data_failures(rows)) == len(rows)
    assert views.data_table(rows).count("\n") == 1 + len(rows)


def test_the_table_says_what_each_stage_adds():
    times = dict(zip(views.STAGES, (0.010, 0.016, 0.018, 0.001), strict=True))
    rows = [{"case": "c", "stage": s, "seconds": t, "fault": None, "images_per_s": 1} for s, t in times.items()]
    lines = views.data_table(rows).splitlines()[2:]
    assert [line.split(" | ")[1:3] for line in lines] == [["10", ""], ["16", "6"], ["18", "2"], ["1", ""]]
