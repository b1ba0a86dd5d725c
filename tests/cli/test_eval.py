"""``fasttrain eval`` from end to end: the same weights give the same figures, whatever they come in."""

import json
import shutil
import sys
from math import inf, nan

import pytest

from fasttrain.cli import main
from tests.small_runs import flags, start

_QUICK = ["--linear_epochs", "2", "--lidar_images", "4", "--lidar_views", "2", "--num_workers", "1"]
_OF_THE_CALL = {"network", "checkpoint", "extracted", "cached", "arch"}


@pytest.fixture
def evaluated(tmp_path, images):
    """Runs the command and returns the figures of its file."""

    def run(*arguments):
        file = tmp_path / f"{len(list(tmp_path.glob('*.json')))}.json"
        data = [] if "--data_path" in arguments else ["--data_path", images]
        cache = [] if "--cache" in arguments else ["--cache", tmp_path / "cache"]
        flags = [*arguments, *data, *_QUICK, *cache, "--output", file]
        assert main(["eval", *map(str, flags)]) == 0
        return json.loads(file.read_text())

    return run


def _figures(actual):
    return {name: value for name, value in actual.items() if name not in _OF_THE_CALL}


def test_a_run(simclr_run, evaluated, capsys):
    actual = evaluated(simclr_run)
    assert (actual["network"], actual["arch"], actual["size"]) == ("simclr student, step 2", "conv_small", 32)
    assert (actual["dataset"], actual["images"], actual["images_val"]) == ("noise", 32, 8)
    assert set(actual["knn"]) == {"10", "20", "200"}
    assert (actual["extracted"], actual["cached"]) == (32 + 8 + 4, 0)
    out, err = capsys.readouterr()
    for name in ("k-NN, k = 20", "linear probe", "logistic", "1 % of", "RankMe", "alpha-ReQ", "LiDAR", "alignment"):
        assert name in out
    assert "44 images extracted, 0 cached" in err


@pytest.mark.slow
def test_two_ranks_share_a_run_s_evaluation(simclr_run, images, evaluated, tmp_path):
    """Under a launcher; the command itself, for what is in the path may be another installation."""
    alone, file = evaluated(simclr_run), tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    program = [sys.executable, "-c", "import sys; from fasttrain.cli import main; sys.exit(main())"]
    arguments = ["eval", simclr_run, "--data_path", images, *_QUICK, "--cache", "none", "--output", file]
    process = start(map(str, arguments), *launch, *program)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("RankMe") == 1  # rank 0 alone says it
    together = json.loads(file.read_text())
    assert _rounded(_figures(together)) == _rounded(_figures(alone))


def _rounded(actual):
    """Features differ in their last bits with the batches that they were made in."""
    if isinstance(actual, dict):
        return {name: _rounded(value) for name, value in actual.items()}
    return round(actual, 3) if isinstance(actual, float) else actual


def test_the_training_s_own_figures(simclr_run, evaluated):
    """The evaluation at the end of a run is the same k-NN and the same effective rank."""
    summary = json.loads((simclr_run / "summary.json").read_text())
    actual = evaluated(simclr_run, "--metrics", "knn", "spectrum")
    assert actual["knn"]["20"]["top1"] == summary["knn_top1"]
    assert actual["rankme"] == pytest.approx(summary["rankme"], rel=1e-5)


def test_a_second_call_extracts_nothing(simclr_run, evaluated):
    first, second = evaluated(simclr_run), evaluated(simclr_run)
    assert (second["extracted"], second["cached"]) == (0, 44)
    assert _figures(first) == _figures(second)


def test_teacher_and_student_differ(dino_run, evaluated):
    assert evaluated(dino_run, "--metrics", "views")["network"].startswith("dino teacher")
    actual = [evaluated(dino_run, "--which", which, "--metrics", "views") for which in ("teacher", "student")]
    assert actual[0]["lidar"] != actual[1]["lidar"]


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", ["--size", "32"]), pytest.param("test_vit", [], marks=pytest.mark.slow)]
)
def test_timm_network_equals_its_exported_weights(evaluated, tmp_path, name, size):
    """Three ways to one network: timm's own, our export by itself, and our export in timm's; no features are shared."""
    file = tmp_path / "stock.safetensors"
    stock = ["--timm", name, "--seed", "4"]
    assert main(["export", *stock, "--format", "timm", "--output", str(file)]) == 0
    same = [*size, "--seed", "4", "--cache", "none"]
    actual = [evaluated(*source, *same) for source in (stock, [file], ["--timm", name, "--pretrained", file])]
    assert [(one["extracted"], one["cached"]) for one in actual] == [(32 + 8 + 4, 0)] * 3
    assert _figures(actual[0]) == _figures(actual[1]) == _figures(actual[2])  # to the last digit
    assert actual[0]["knn"]["10"]["top1"] > 0
    other = evaluated("--timm", name, *size, "--seed", "5")
    assert other["rankme"] != actual[0]["rankme"]


def test_a_run_and_its_export_are_the_same(simclr_run, evaluated, tmp_path):
    file = tmp_path / "own.safetensors"
    assert main(["export", str(simclr_run), "--format", "safetensors", "--output", str(file)]) == 0
    assert _figures(evaluated(simclr_run)) == _figures(evaluated(file))


def test_images_without_labels(simclr_run, images, evaluated, capsys):
    actual = evaluated(simclr_run, "--data_path", images / "train" / "cat")
    assert "left out, since the data has no labels (class sub-folders)" in capsys.readouterr().err
    assert "knn" not in actual
    assert actual["rankme"] > 1


def test_the_run_s_own_data_unless_given(simclr_run, tmp_path):
    file = tmp_path / "f.json"
    flags = ["--metrics", "spectrum", "--cache", "none", "--output", str(file)]
    assert main(["eval", str(simclr_run), *flags]) == 0
    assert json.loads(file.read_text())["dataset"] == "noise"


def test_a_run_s_data_is_found_from_another_folder(images, tmp_path, monkeypatch):
    """It was trained with a relative path."""
    monkeypatch.chdir(images.parent)
    assert main(["train", *flags(images.name, tmp_path / "run", "--limit_steps", 1)]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "run", "--metrics", "spectrum", "--cache", "none"]) == 0


def _unfinished(run, tmp_path):
    shutil.rmtree(run / "checkpoints")


def _half_written(run, tmp_path):
    (state,) = run.glob("checkpoints/step-*/mp_rank_00_model_states.pt")
    state.write_bytes(state.read_bytes()[:5000])


def _of_another_network(run, tmp_path):
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("arch: conv_small", "arch: resnet18"))


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (_unfinished, "no complete checkpoint"),
        (_half_written, "step-00000002: the checkpoint is corrupt: mp_rank_00_model_states.pt has 5,000 bytes"),
        (_of_another_network, "another network than ResNet"),
    ],
)
def test_runs_that_cannot_be_evaluated_are_one_line(simclr_run, tmp_path, capsys, harm, line):
    copy = shutil.copytree(simclr_run, tmp_path / "run")
    harm(copy, tmp_path)
    assert main(["eval", str(copy)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fasttrain: ")
    assert line in err
    assert err.count("\n") == 1


def test_an_output_that_cannot_be_written_is_one_line(simclr_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--metrics", "spectrum", "--cache", "none", "--output", str(tmp_path / "file" / "f.json")]
    assert main(["eval", str(simclr_run), *flags]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_metrics_of_a_collapsed_network_are_valid_json(simclr_run, evaluated, monkeypatch, tmp_path):
    monkeypatch.setattr(json, "loads", lambda text: json.JSONDecoder(parse_constant=pytest.fail).decode(text))
    monkeypatch.setattr("fasttrain.evaluate.protocol.evaluate", lambda *_, **__: {"rankme": nan, "knn": {"10": inf}})
    monkeypatch.setattr("fasttrain.evaluate.table.table", lambda *_: "")
    actual = evaluated(simclr_run)
    assert (actual["rankme"], actual["knn"]) == (None, {"10": None})
