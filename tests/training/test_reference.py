"""A reference set in continued pretraining: what is measured, and the stop when too much of it is forgotten."""

import json

import pytest

from fasttrain.evaluate.evaluator import Evaluator
from fasttrain.run import main
from tests.small_runs import flags, lines

pytestmark = pytest.mark.usefixtures("one_thread")


def _watch(images, *more):
    return ("--reference_path", images, "--knn_every", 1, "--epochs", 4, *more)


@pytest.fixture
def accuracies(monkeypatch):
    """Reference accuracies by evaluation, instead of the small network's own, which are chance."""
    values, backbone = [], Evaluator.backbone

    def evaluated(self, network, progress, name="k-NN"):
        evaluation = backbone(self, network, progress, name)
        if name.startswith("reference"):
            object.__setattr__(evaluation, "knn_top1", values.pop(0))
        return evaluation

    monkeypatch.setattr(Evaluator, "backbone", evaluated)
    return values


def _checkpoints(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir() if path.is_dir())


def test_unchanged_network_keeps_what_it_knows(images, tmp_path, capsys):
    assert main(flags(images, tmp_path, *_watch(images), "--epochs", 2, "--freeze_backbone_epochs", 2)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    first = lines(tmp_path / "metrics.jsonl")[3]
    assert "reference set" in capsys.readouterr().out
    for values in (first, summary):
        assert values["reference_knn_top1"] is not None
        assert values["reference_rankme"] > 1
        # BatchNorm's statistics move, the weights do not.
        assert values["reference_cka"] == pytest.approx(1, abs=0.1)


def test_run_that_forgets_stops_at_its_last_good_checkpoint(images, tmp_path, accuracies, capsys):
    accuracies += [0.9, 0.895, 0.88, 0.5]
    assert main(flags(images, tmp_path, *_watch(images, "--max_forgetting", 1))) == 3
    err = capsys.readouterr().err
    assert "fell from 0.900 to 0.880, by more than --max_forgetting 1 points, at step 8" in err
    assert "The run is back at step-00000004." in err
    assert err.count("\n") == 1
    assert _checkpoints(tmp_path) == ["step-00000004", "step-00000008-forgotten"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004"
    measured = {line["step"]: line.get("reference_knn_top1") for line in lines(tmp_path / "metrics.jsonl")}
    assert measured[4] == 0.895
    assert measured[8] == 0.88


def test_resumed_run_compares_with_the_first_start(images, tmp_path, accuracies, capsys):
    accuracies += [0.9, 0.895, 0.5]
    watch = _watch(images, "--max_forgetting", 1)
    assert main(flags(images, tmp_path, *watch, "--limit_steps", 4)) == 0  # measured at the start and at the end
    accuracies[:] = [0.88]
    assert main(flags(images, tmp_path, *watch)) == 3
    assert "from 0.900 to 0.880" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max_forgetting", 1), "--max_forgetting: needs --reference_path"),
        (("--reference_path", "missing", "--knn_every", 1), "--reference_path: "),
        (("--reference_path", "UNLABELLED", "--max_forgetting", 1), "--max_forgetting: needs k-NN accuracy"),
        (("--reference_path", "IMAGES", "--knn_every", 0), "--reference_path: is measured every --knn_every"),
    ],
)
def test_impossible_reference_is_refused_in_one_line(images, tmp_path, capsys, more, message):
    paths = {"IMAGES": images, "UNLABELLED": images / "train" / "cat"}
    arguments = flags(images, tmp_path / "run", *(paths.get(part, part) for part in more))
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_lost_start_is_named(images, tmp_path, capsys):
    assert main(flags(images, tmp_path, *_watch(images), "--limit_steps", 4)) == 0
    (tmp_path / "reference.safetensors").unlink()
    assert main(flags(images, tmp_path, *_watch(images))) == 2
    assert "reference.safetensors cannot be read" in capsys.readouterr().err
