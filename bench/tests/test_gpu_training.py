"""The training part of bench/gpu: that it runs the command and reads its record, here on the CPU."""

import pytest

from bench.gpu import training, views


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return training.draw(tmp_path_factory.mktemp("drawn") / "images", views.jpegs(8, 40, 50), copies=2)


def test_a_folder_of_two_classes_is_drawn(data):
    assert len(list(data.glob("train/*/*.jpg"))) == 16
    assert {path.parent.name for path in data.glob("val/*/*.jpg")} == {"a", "b"}


def test_a_run_is_made_and_read(data, tmp_path):
    flags = ("--method", "simclr", "--recipe", "cifar", "--batch_size_per_gpu", "8", "--hidden_dim", "16")
    found = training.train(flags, data, tmp_path / "run", steps=4, every=1, warm=2)
    assert found["steps"] == 4
    assert found["images_per_s"] > 0
    assert 0 <= found["data_wait"] <= 1
    assert len(found["loss"]) == 2


def test_a_run_that_fails_says_why(data, tmp_path):
    with pytest.raises(RuntimeError, match=r"status 2: .*batch"):
        training.train(("--method", "simclr", "--recipe", "cifar", "--batch_size_per_gpu", "999"), data, tmp_path)


def test_first_steps_do_not_count():
    lines = [{"step": s, "images_per_s": 100.0 * s, "data_wait": 0.5 / s, "loss": 1 / s} for s in (1, 10, 20, 30)]
    found = training.figures(lines, warm=10)
    assert found == {"steps": 30, "images_per_s": 2500.0, "data_wait": 0.0208, "loss": [1.0, 0.0333]}


def test_the_table_has_a_line_a_run_and_failures_are_named():
    good = {"case": "a", "fault": None, "images_per_s": 10, "data_wait": 0.123, "loss": [2, 1], "peak_bytes": 2**30}
    bad = {"case": "b", "fault": "RuntimeError: status 1: no"}
    lines = training.training_table([good, bad]).splitlines()
    assert lines[2:] == ["| a | 10 | 12.3 % | 1.0 | 2 to 1 |", "| b | RuntimeError: status 1: no |  |  |  |"]
    assert training.training_failures([good, bad]) == ["b: RuntimeError: status 1: no"]
