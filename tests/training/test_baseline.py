"""The k-NN accuracy before training: measured once, on a bounded number of images, or not at all."""

import json

import pytest

from fasttrain.evaluate.evaluator import Evaluator
from fasttrain.run import main
from fasttrain.training import trainer
from tests.small_runs import flags, when_logged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def evaluations(monkeypatch):
    """The names of the evaluations that were made."""
    names, backbone = [], Evaluator.backbone

    def evaluated(self, network, progress, name="k-NN"):
        names.append(name)
        return backbone(self, network, progress, name)

    monkeypatch.setattr(Evaluator, "backbone", evaluated)
    return names


def _fail():
    raise RuntimeError


def _summary(output):
    return json.loads((output / "summary.json").read_text())


def test_baseline_is_measured_once_per_run(images, tmp_path, evaluations):
    """A run that ended before its first checkpoint measured it again: minutes on real photographs."""
    with when_logged(1, _fail):
        assert main(flags(images, tmp_path)) == 1
    assert main(flags(images, tmp_path, "--limit_steps", 1)) == 0
    assert main(flags(images, tmp_path, "--limit_steps", 2)) == 0
    assert evaluations.count("k-NN of the untrained network") == 1
    other = ("--resume", "never", "--arch", "test_convnext", "--limit_steps", 1)
    assert main(flags(images, tmp_path, *other)) == 0
    assert evaluations.count("k-NN of the untrained network") == 2


def test_knn_every_0_evaluates_nothing(images, tmp_path, evaluations, capsys):
    assert main(flags(images, tmp_path, "--limit_steps", 1, "--knn_every", 0)) == 0
    assert evaluations == []
    assert not (tmp_path / "baseline.json").exists()
    summary = _summary(tmp_path)
    assert {v for k, v in summary.items() if k.startswith("knn") or k == "rankme"} == {None}
    assert not summary["collapsed"]


def test_knn_uses_at_most_the_images_of_its_flags(images, tmp_path, capsys):
    few = ("--limit_steps", 1, "--knn_train_images", 10, "--knn_val_images", 4)
    assert main(flags(images, tmp_path, *few)) == 0
    summary = _summary(tmp_path)
    assert (summary["knn_train_images"], summary["knn_val_images"]) == (10, 4)
    assert summary["knn_top1"] * 4 in range(5)
    assert "10 training and 4 held-out images" in capsys.readouterr().out


def test_finished_run_that_is_started_again_builds_nothing(images, tmp_path, monkeypatch, capsys):
    arguments = flags(images, tmp_path, "--limit_steps", 1)
    assert main(arguments) == 0
    before = capsys.readouterr().out.splitlines()[-1]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "build_method", None)
        assert main(arguments) == 0
    assert capsys.readouterr().out == f"{before}\n"
    assert main([*arguments, "--limit_steps", "2"]) == 0  # another setting continues
    assert _summary(tmp_path)["steps"] == 2
