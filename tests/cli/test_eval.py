"""``fasttrain eval``: the same weights have the same figures in every format."""

import json
import shutil
import sys
from math import inf, nan

import pytest

from fasttrain.cli import main
from fasttrain.training.records import read_summary
from tests.small_runs import flags, start

_QUICK = ["--linear_epochs", "2", "--lidar_images", "4", "--lidar_views", "2", "--num_workers", "1"]
_OF_THE_CALL = {"network", "checkpoint", "extracted", "cached", "arch"}


@pytest.fixture
def evaluated(tmp_path, images):
    """Return a function that runs the command and returns the figures of its file."""

    def run(*arguments):
        file = tmp_path / f"{len(list(tmp_path.glob('*.json')))}.json"
        data = [] if "--data_path" in arguments else ["--data_path", images]
        cache = [] if "--cache" in arguments else ["--cache", tmp_path / "cache"]
        assert main(["eval", *map(str, [*arguments, *data, *_QUICK, *cache, "--output", file])]) == 0
        return json.loads(file.read_text())

    return run


def _figures(content):
    return {name: value for name, value in content.items() if name not in _OF_THE_CALL}


def _rounded(value):
    """Round figures: features differ in their last bits with the batches."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def test_eval_of_a_run_prints_and_writes_all_figures(simclr_run, evaluated, capsys):
    content = evaluated(simclr_run)
    assert (content["network"], content["arch"], content["size"]) == ("simclr student, step 2", "conv_small", 32)
    assert (content["dataset"], content["images"], content["images_val"]) == ("noise", 32, 8)
    assert set(content["knn"]) == {"10", "20", "200"}
    assert (content["extracted"], content["cached"]) == (32 + 8 + 4, 0)
    out, err = capsys.readouterr()
    for name in ("k-NN, k = 20", "linear probe", "logistic", "1 % of", "RankMe", "alpha-ReQ", "LiDAR", "alignment"):
        assert name in out
    assert "44 images extracted, 0 cached" in err
    # The training's own figures at its end are the same.
    summary = read_summary(simclr_run)
    assert content["knn"]["20"]["top1"] == summary["knn_top1"]
    assert content["rankme"] == pytest.approx(summary["rankme"], rel=1e-5)
    again = evaluated(simclr_run)
    assert (again["extracted"], again["cached"]) == (0, 44)
    assert _figures(again) == _figures(content)


@pytest.mark.slow
def test_eval_on_two_ranks_has_the_same_figures(simclr_run, images, evaluated, tmp_path):
    alone, file = evaluated(simclr_run), tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python"]
    program = [sys.executable, "-c", "import sys; from fasttrain.cli import main; sys.exit(main())"]
    arguments = ["eval", simclr_run, "--data_path", images, *_QUICK, "--cache", "none", "--output", file]
    process = start(map(str, arguments), *launch, *program)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("RankMe") == 1  # only rank 0 prints
    assert _rounded(_figures(json.loads(file.read_text()))) == _rounded(_figures(alone))


def test_eval_of_teacher_and_student_differs(dino_run, evaluated):
    default, teacher, student = (
        evaluated(dino_run, *which, "--metrics", "views")
        for which in ([], ["--which", "teacher"], ["--which", "student"])
    )
    assert default["network"].startswith("dino teacher")
    assert default["lidar"] == teacher["lidar"] != student["lidar"]


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", ["--size", "32"]), pytest.param("test_vit", [], marks=pytest.mark.slow)]
)
def test_eval_of_timm_and_its_exports_is_bit_identical(evaluated, tmp_path, name, size):
    """The network comes from timm, from our file by itself, and from our file through timm."""
    file = tmp_path / "stock.safetensors"
    stock = ["--timm", name, "--seed", "4"]
    assert main(["export", *stock, "--format", "timm", "--output", str(file)]) == 0
    same = [*size, "--seed", "4", "--cache", "none"]
    first, *others = (evaluated(*source, *same) for source in (stock, [file], ["--timm", name, "--pretrained", file]))
    assert [_figures(other) for other in others] == [_figures(first)] * 2
    assert first["knn"]["10"]["top1"] > 0
    assert evaluated("--timm", name, *size, "--seed", "5")["rankme"] != first["rankme"]


def test_eval_of_a_run_s_export_has_the_same_figures(simclr_run, evaluated, tmp_path):
    file = tmp_path / "own.safetensors"
    assert main(["export", str(simclr_run), "--format", "safetensors", "--output", str(file)]) == 0
    assert _figures(evaluated(simclr_run)) == _figures(evaluated(file))


def test_eval_without_labels_has_the_spectrum(simclr_run, images, evaluated, capsys):
    content = evaluated(simclr_run, "--data_path", images / "train" / "cat")
    assert "left out" in capsys.readouterr().err
    assert "knn" not in content
    assert content["rankme"] > 1


def test_eval_uses_the_run_s_data_from_another_folder(images, tmp_path, monkeypatch):
    """The run was trained with a relative path."""
    monkeypatch.chdir(images.parent)
    assert main(["train", *flags(images.name, tmp_path / "run", "--limit_steps", 1)]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "run", "--metrics", "spectrum", "--cache", "none", "--output", "f.json"]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["dataset"] == "noise"


def _remove_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def _cut_checkpoint(run):
    (state,) = run.glob("checkpoints/step-*/mp_rank_00_model_states.pt")
    state.write_bytes(state.read_bytes()[:5000])


def _change_network(run):
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("arch: conv_small", "arch: resnet18"))


@pytest.mark.parametrize(
    ("damage", "names"),
    [(_remove_checkpoints, "checkpoint"), (_cut_checkpoint, "step-00000002"), (_change_network, "ResNet")],
)
def test_eval_of_a_damaged_run_is_refused(simclr_run, tmp_path, capsys, damage, names):
    copy = shutil.copytree(simclr_run, tmp_path / "run")
    damage(copy)
    assert main(["eval", str(copy)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: ")
    assert names in line


@pytest.mark.parametrize(
    ("flags", "names"), [(["--output", "/dev/null/x"], "--output /dev/null/x: "), (["--seed", str(10**20)], "--seed: ")]
)
def test_eval_refuses_invalid_flags(simclr_run, flags, names, capsys):
    assert main(["eval", str(simclr_run), "--metrics", "spectrum", "--cache", "none", *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"fasttrain: {names}")


def test_eval_writes_null_for_figures_that_are_not_finite(simclr_run, evaluated, monkeypatch):
    """NaN and Infinity are not JSON."""
    monkeypatch.setattr("fasttrain.evaluate.protocol.evaluate", lambda *_, **__: {"rankme": nan, "knn": {"10": inf}})
    monkeypatch.setattr("fasttrain.evaluate.table.table", lambda *_: "")
    content = evaluated(simclr_run)
    assert (content["rankme"], content["knn"]) == (None, {"10": None})


def test_unequal_classes_have_a_balanced_accuracy(simclr_run, images, tmp_path, capsys):
    fewer = shutil.copytree(images, tmp_path / "images")
    for image in sorted((fewer / "val" / "cat").iterdir())[1:]:
        image.unlink()
    for path, expected in ((images, False), (fewer, True)):
        arguments = ["eval", simclr_run, "--data_path", path, "--metrics", "knn", "--cache", "none"]
        assert main([str(argument) for argument in arguments]) == 0
        assert ("balanced" in capsys.readouterr().out) == expected


def test_ctrl_c_during_eval_ends_with_one_line(simclr_run, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fasttrain.evaluate.cache.extract_views", interrupted)
    assert main(["eval", str(simclr_run), "--cache", "none"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fasttrain: stopped by SIGINT"
