"""Test the loader's and the training's parts of bench/gpu on the CPU. The measurements need a GPU."""

from types import SimpleNamespace

import pytest
import torch

from bench.gpu import Budget, Run, training, views
from fasttrain.pipelines import View, ViewRecipe


@pytest.mark.parametrize(("offset", "failures"), [(0, 0), (1, 1)])
def test_views_are_compared_with_the_cpu(offset, failures, monkeypatch):
    """An offset of one standard deviation is 0.225 of 255 levels."""
    first = views._first
    monkeypatch.setattr(
        views, "_first", lambda own, files, device: [g + offset * (device == "cuda") for g in first(own, files, "cpu")]
    )
    row = views.distance(ViewRecipe((View(32),)), views.jpegs(4, 40, 50))
    assert row["mean_levels"] == pytest.approx(57.3 * offset, abs=0.5)
    assert row["repeats"]
    assert len(views.alike_failures([{"method": "dino", "fault": None, **row}])) == failures


@pytest.mark.skipif(torch.cuda.is_available(), reason="every stage fails only without a GPU")
def test_stage_that_fails_is_a_row_and_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "CASES", (views.Case("simclr", "cifar", 4, 32, 32),))
    monkeypatch.setattr(views, "_IMAGES", 4)
    run = Run(tmp_path / "a.json", {}, Budget(100))
    rows = run.start(SimpleNamespace(name="data", until=1))
    views.data(run)
    assert [row["stage"] for row in rows] == list(views.STAGES)
    assert len(views.data_failures(rows)) == len(rows)
    assert views.data_table(rows).count("\n") == 1 + len(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return training.draw(tmp_path_factory.mktemp("generated") / "images", views.jpegs(8, 40, 50), copies=2)


@pytest.mark.slow
def test_training_returns_the_figures_of_the_log(data, tmp_path):
    flags = ("--method", "simclr", "--recipe", "cifar", "--batch_size_per_gpu", "8", "--hidden_dim", "16")
    row = training.train(flags, data, tmp_path / "run", steps=4, every=1, warm=2)
    assert row["steps"] == 4
    assert row["images_per_s"] > 0


@pytest.mark.slow
def test_training_that_fails_raises_with_its_last_line(data, tmp_path):
    with pytest.raises(RuntimeError, match=r"status 2: .*batch"):
        training.train(("--method", "simclr", "--recipe", "cifar", "--batch_size_per_gpu", "999"), data, tmp_path)


def test_figures_leave_out_the_first_steps():
    lines = [{"step": s, "images_per_s": 100.0 * s, "data_wait": 0.5 / s, "loss": 1 / s} for s in (1, 10, 20, 30)]
    figures = training.figures(lines, warm=10)
    assert figures == {"steps": 30, "images_per_s": 2500.0, "data_wait": 0.0208, "loss": [1.0, 0.0333]}
