"""The command end to end: the files that it leaves, and what it prints."""

import json
import shutil

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fasttrain.config.arguments import parse
from fasttrain.distributed.world import World
from fasttrain.run import main
from fasttrain.training import records, trainer
from tests.small_runs import flags, lines

pytestmark = pytest.mark.usefixtures("one_thread")

_METRICS = [
    "step",
    "epoch",
    "loss",
    "entropy",
    "entropy_max",
    "reconstruction",
    "information",
    "deficit",
    "channel_std",
    "effective_rank",
    "lr",
    "weight_decay",
    "momentum",
    "grad_norm",
    "skipped_steps",
    "images_per_s",
    "data_wait",
]
_SUMMARY = {
    "method",
    "entropy_objective",
    "arch",
    "dataset",
    "images",
    "unreadable_images",
    "epochs",
    "steps",
    "seconds",
    "images_per_s",
    "world_size",
    "gpu_peak_bytes",
    "knn_top1",
    "knn_top1_untrained",
    "knn_top1_pixels",
    "rankme",
    "entropy",
    "entropy_max",
    "reconstruction",
    "information",
    "deficit",
    "skipped_steps",
    "rollbacks",
    "collapsed",
    "knn_train_images",
    "knn_val_images",
}


def test_run_leaves_the_documented_files(straight, images):
    output, out = straight
    names = {p.name.split(".tfevents")[0] for p in output.iterdir()}
    files = {"config.yaml", "baseline.json", "metrics.jsonl", "log.txt", "summary.json", "report.html"}
    assert names == files | {"checkpoints", "events.out"}
    assert {p.name for p in (output / "checkpoints").iterdir()} == {"latest", "step-00000008"}
    card = json.loads((output / "checkpoints" / "step-00000008" / "fasttrain.json").read_text())
    assert (card["method"], card["arch"], card["step"], card["world_size"]) == ("simclr", "conv_small", 8, 1)
    assert out.splitlines()[-1].startswith("simclr finished: 8 steps in ")
    assert str(output) in out


def test_metrics_have_one_line_per_logged_step(straight):
    metrics = lines(straight[0] / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert [line["epoch"] for line in metrics] == [step / 4 for step in range(1, 9)]
    for line in metrics:
        measured = ["knn_top1", "rankme"] if line["step"] == 4 else []  # the end of the last epoch is in the summary
        assert list(line) == _METRICS + measured
        assert line["information"] == line["entropy"] - line["reconstruction"]
        assert line["entropy"] <= line["entropy_max"]
        assert line["momentum"] is None
    assert metrics[0]["loss"] != metrics[1]["loss"]


def test_log_has_one_line_per_epoch_with_means(straight):
    log, metrics = lines(straight[0] / "log.txt"), lines(straight[0] / "metrics.jsonl")
    assert [(line["epoch"], line["step"]) for line in log] == [(0, 4), (1, 8)]
    for line, part in zip(log, (metrics[:4], metrics[4:]), strict=True):
        means = {k for k in line if k.startswith("train_")}
        timed = {"train_images_per_s", "train_data_wait"}
        bound = {f"train_{name}" for name in _METRICS[3:10] if name != "entropy_max"}
        assert means == {"train_loss", "train_lr", "train_weight_decay", "train_grad_norm"} | bound | timed
        for name in means:
            assert line[name] == pytest.approx(sum(p[name.removeprefix("train_")] for p in part) / 4)


def test_summary_has_the_figures_of_the_end(straight):
    summary = json.loads((straight[0] / "summary.json").read_text())
    last = lines(straight[0] / "metrics.jsonl")[-1]
    assert set(summary) == _SUMMARY
    expected = {"method": "simclr", "entropy_objective": False, "dataset": "noise", "images": 32, "world_size": 1}
    expected |= {"steps": 8, "epochs": 2, "unreadable_images": 0, "collapsed": False}
    expected |= {name: last[name] for name in ("entropy", "entropy_max", "reconstruction", "information", "deficit")}
    assert {k: summary[k] for k in expected} == expected
    for name in ("knn_top1", "knn_top1_untrained", "knn_top1_pixels"):
        assert summary[name] * 8 in range(9)  # of 8 held-out images
    assert 1 < summary["rankme"] <= 32


def test_tensorboard_has_the_same_values(straight):
    board = EventAccumulator(str(straight[0])).Reload()
    assert set(board.Tags()["scalars"]) == set(_METRICS) - {"step", "epoch", "momentum"} | {"knn_top1", "rankme"}
    losses = {event.step: event.value for event in board.Scalars("loss")}
    expected = {line["step"]: line["loss"] for line in lines(straight[0] / "metrics.jsonl")}
    assert losses == pytest.approx(expected, rel=1e-6)


def test_first_last_and_evaluated_steps_are_logged(images, tmp_path):
    """A line with k-NN once carried the loss of an earlier step, and after a resume there was none to carry."""
    arguments = flags(images, tmp_path, "--log_every", 100, "--knn_every", 1)
    assert main([*arguments, "--limit_steps", "2"]) == 0
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert main(arguments) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["epoch"]) for line in metrics] == [(1, 0.25), (2, 0.5), (4, 1), (8, 2)]
    assert len({line["loss"] for line in metrics}) == 4
    assert ["knn_top1" in line for line in metrics] == [False, False, True, False]


def test_card_states_the_origin_of_the_checkpoint(straight):
    card = json.loads((straight[0] / "checkpoints" / "step-00000008" / "fasttrain.json").read_text())
    assert card["batch"] == 8
    assert set(card["origin"]) == {"config", "commit", "torch", "deepspeed"}
    assert card["origin"]["torch"] == torch.__version__
    assert list(card["files"]) == ["mp_rank_00_model_states.pt"]


def test_bad_files_are_named_once_counted_and_skipped(images, tmp_path, capfd):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    whole = (root / "train" / "cat" / "00.jpg").read_bytes()
    bad = [root / "train" / "cat" / "cut.jpg", root / "train" / "dog" / "00.jpg", root / "val" / "dog" / "text.png"]
    bad[0].write_bytes(whole[: len(whole) // 2])
    bad[1].write_text("no image at all")
    bad[2].write_text("nor this")
    # Headers are whole, what follows is not: only the decoder finds out.
    bad.append(root / "train" / "dog" / "zeros.png")
    good = (root / "train" / "dog" / "01.png").read_bytes()
    at = good.index(b"IDAT") + 10
    bad[3].write_bytes(good[:at] + bytes(len(good) - at - 12) + good[-12:])
    assert main(flags(root, tmp_path / "run")) == 0
    out = capfd.readouterr().out
    assert [out.count(f"{path}: ") for path in bad] == [1, 1, 1, 1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["images"], summary["unreadable_images"]) == (35, 4)
    assert summary["knn_top1"] is not None


def test_images_without_labels_have_no_knn(images, tmp_path, capsys):
    arguments = flags(images / "train" / "cat", tmp_path, "--limit_steps", 2, "--knn_every", 1)
    assert main(arguments) == 0
    assert "no labels" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [v for k, v in summary.items() if k.startswith("knn_top1")] == [None, None, None]
    assert summary["rankme"] > 1
    assert summary["images"] == 16


@pytest.mark.parametrize(("name", "suffix"), [("dino", ""), ("dino", "-er")])
def test_default_output_folder_is_named_by_method_and_time(tmp_path, monkeypatch, name, suffix):
    monkeypatch.chdir(tmp_path)
    config, _ = parse(["--method", name, *(["--entropy"] if suffix else [])])
    path = records.output_folder(config, World(0, 1, 0, 1))
    assert path.is_dir()
    assert path.parent.name == "runs"
    assert path.name.startswith(f"{name}{suffix}-2")


def test_two_runs_within_a_second_get_two_folders(tmp_path, monkeypatch):
    """The second run once resumed from the first one's checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records.time, "strftime", lambda form: "20261127-123456")
    config, _ = parse(["--method", "dino"])
    names = [records.output_folder(config, World(0, 1, 0, 1)).name for _ in range(3)]
    assert names == ["dino-20261127-123456", "dino-20261127-123456-2", "dino-20261127-123456-3"]


def test_config_of_a_run_reads_back(straight, capsys):
    file = straight[0] / "config.yaml"
    assert main(["--config", str(file), "--print_config"]) == 0
    assert capsys.readouterr().out == file.read_text()
    assert yaml.safe_load(file.read_text())["batch_size_per_gpu"] == 8


def test_print_config_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "train", lambda *_: pytest.fail("trained"))
    assert main(["--method", "simclr", "--print-config", "--batch-size-per-gpu=16"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["method"], printed["recipe"], printed["batch_size_per_gpu"]) == ("simclr", "demo", 16)
    assert list(tmp_path.iterdir()) == []
