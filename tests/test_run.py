"""The command end to end: what it leaves, how it goes on, how it stops, and what it says of what cannot be used."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fasttrain import checkpoint, cli, interruption, recorder, spikes, trainer, watchdog
from fasttrain.durable import checksum
from fasttrain.recorder import Recorder
from fasttrain.run import main
from tests.small_runs import assert_same_run, flags, lines, weights, write_images

_ROOT = Path(__file__).parent.parent
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # left behind by runs in this process
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
}


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that are started here: sums then have one order, and spinning threads cost nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "noise")


def _command(arguments, *start):
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER}
    environment |= {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [*(start or (sys.executable, "fasttrain/run.py")), *arguments]
    return subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Two epochs of four steps in one go, as a user starts them; flags with dashes, and what a launcher injects."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    given = [a.replace("_", "-") if a.startswith("--") else a for a in flags(data, output, "--knn_every", 1)]
    process = _command([*given, "--local_rank=0"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return output, out


def test_files_of_a_run(straight, data):
    output, out = straight
    names = {p.name.split(".tfevents")[0] for p in output.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "log.txt", "summary.json", "report.html"}
    assert names == files | {"checkpoints", "events.out"}
    assert {p.name for p in (output / "checkpoints").iterdir()} == {"latest", "step-00000008"}
    card = json.loads((output / "checkpoints" / "step-00000008" / "fasttrain.json").read_text())
    assert (card["method"], card["arch"], card["step"], card["world_size"]) == ("simclr", "conv_small", 8, 1)
    assert out.splitlines()[-1].startswith("simclr finished: 8 steps in ")
    assert str(output) in out


def test_metrics(straight):
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


def test_log_has_a_line_an_epoch_with_the_means(straight):
    log, metrics = lines(straight[0] / "log.txt"), lines(straight[0] / "metrics.jsonl")
    assert [(line["epoch"], line["step"]) for line in log] == [(0, 4), (1, 8)]
    for line, part in zip(log, (metrics[:4], metrics[4:]), strict=True):
        means = {k for k in line if k.startswith("train_")}
        timed = {"train_images_per_s", "train_data_wait"}
        bound = {f"train_{name}" for name in _METRICS[3:10] if name != "entropy_max"}
        assert means == {"train_loss", "train_lr", "train_weight_decay", "train_grad_norm"} | bound | timed
        for name in means:
            assert line[name] == pytest.approx(sum(p[name.removeprefix("train_")] for p in part) / 4)


def test_summary(straight):
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


def test_config_reads_back_to_the_same_configuration(straight, capsys):
    file = straight[0] / "config.yaml"
    assert main(["--config", str(file), "--print_config"]) == 0
    assert capsys.readouterr().out == file.read_text()
    assert yaml.safe_load(file.read_text())["batch_size_per_gpu"] == 8


def test_resume_gives_the_run_in_one_go(straight, data, tmp_path, capsys):
    assert main(flags(data, tmp_path, "--knn_every", 1, "--limit_steps", 3)) == 0  # in mid-epoch
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3
    leftover = tmp_path / "checkpoints" / ".step-00000005.part"  # of a run that was killed
    leftover.mkdir()
    assert main(flags(data, tmp_path, "--knn_every", 1)) == 0
    assert "resumed after step 3" in capsys.readouterr().out
    assert_same_run(tmp_path, straight[0])
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-00000008"}


def test_stochastic_depth_is_drawn_alike_after_a_resume(data, tmp_path):
    more = ["--arch", "test_convnext", "--drop_path_rate", "0.5", "--knn_every", 0, "--limit_steps"]
    assert main(flags(data, tmp_path / "straight", *more, 4)) == 0
    assert main(flags(data, tmp_path / "parts", *more, 2)) == 0
    assert main(flags(data, tmp_path / "parts", *more, 4)) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


def test_a_finished_run_stays_as_it_is(straight, data, tmp_path):
    shutil.copytree(straight[0], tmp_path / "copy")
    assert main(flags(data, tmp_path / "copy", "--knn_every", 1)) == 0
    assert_same_run(tmp_path / "copy", straight[0])
    before, after = ((o / "summary.json").read_text() for o in (straight[0], tmp_path / "copy"))
    assert after == before  # its times too


def test_a_shorter_limit_than_what_was_made_is_no_harm(straight, data, tmp_path):
    assert main(flags(data, tmp_path, "--resume", straight[0], "--limit_steps", 2)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["images_per_s"] == 0


def test_sigterm_publishes_a_checkpoint_with_which_the_run_goes_on(data, tmp_path):
    output = tmp_path / "run"
    process = _command(flags(data, output, "--epochs", 100_000, "--knn_every", 0))
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    done = len(lines(metrics))
    assert err == f"fasttrain: stopped by SIGTERM at step {done}; --resume auto --output_dir {output} goes on\n"
    assert (output / "checkpoints" / "latest").read_text() == f"step-{done:08d}"
    assert not (output / "summary.json").exists()
    assert main(flags(data, output, "--epochs", 100_000, "--knn_every", 0, "--limit_steps", done + 2)) == 0
    assert [line["step"] for line in lines(metrics)] == list(range(1, done + 3))


@contextmanager
def _when_logged(step, action):
    """Do something once a step's line is written."""
    write = Recorder.step

    def written(self, values):
        write(self, values)
        if values["step"] == step:
            action()

    Recorder.step = written
    try:
        yield
    finally:
        Recorder.step = write


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_in_mid_epoch_and_resume_gives_the_run_in_one_go(straight, data, tmp_path, capsys, number, status):
    with _when_logged(6, lambda: os.kill(os.getpid(), signal.Signals[number])):
        assert main(flags(data, tmp_path, "--knn_every", 1)) == status
    assert capsys.readouterr().err.startswith(f"fasttrain: stopped by {number} at step 6; ")
    assert main(flags(data, tmp_path, "--knn_every", 1)) == 0
    assert_same_run(tmp_path, straight[0])


def test_a_second_ctrl_c_stops_at_once(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(interruption, "_APART", 0)
    with _when_logged(2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]):
        assert main(flags(data, tmp_path, "--knn_every", 0)) == 130
    assert capsys.readouterr().err == "fasttrain: stopped at once by a second SIGINT; the last checkpoint stays\n"
    assert not (tmp_path / "checkpoints").exists()


def _poison(monkeypatch, *calls):
    """Give some batches, numbered from 1 on over all runs of a test, values that are no numbers."""
    once, made = trainer._Run._next, iter(range(1, 1000))

    def poisoned(self, batches, meter):
        batch = once(self, batches, meter)
        if next(made) in calls:
            batch.views[0][0, 0].fill_(math.nan)
        return batch

    monkeypatch.setattr(trainer._Run, "_next", poisoned)


def test_a_bad_batch_is_skipped_counted_and_told_of_and_a_resumed_run_knows(data, tmp_path, capsys, monkeypatch):
    given = ("--knn_every", 0, "--log_every", 2)
    _poison(monkeypatch, 3, 5, 8 + 3, 8 + 5)
    assert main(flags(data, tmp_path / "straight", *given)) == 0
    out = capsys.readouterr().out
    for step in (3, 5):
        assert out.count(f"skipped: the loss is nan at step {step}\n") == 1
    assert main(flags(data, tmp_path / "parts", *given, "--limit_steps", 3)) == 0
    assert main(flags(data, tmp_path / "parts", *given)) == 0
    for run in ("straight", "parts"):
        metrics = [line for line in lines(tmp_path / run / "metrics.jsonl") if line["step"] % 2 == 0]
        assert [(line["step"], line["skipped_steps"]) for line in metrics] == [(2, 0), (4, 1), (6, 2), (8, 2)]
        assert json.loads((tmp_path / run / "summary.json").read_text())["skipped_steps"] == 2
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "straight")
    assert [path for path in ours if not torch.equal(ours[path], theirs[path])] == []


def test_a_skipped_step_that_is_logged_has_no_part_in_the_epochs_mean(data, tmp_path, monkeypatch):
    _poison(monkeypatch, 3)
    assert main(flags(data, tmp_path, "--knn_every", 0)) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["loss"] is None for line in metrics] == [step == 3 for step in range(1, 9)]
    first = lines(tmp_path / "log.txt")[0]
    assert first["train_loss"] == pytest.approx(sum(metrics[i]["loss"] for i in (0, 1, 3)) / 3)


def test_a_spike_is_told_with_entropy_and_reconstruction(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(spikes, "_LEAST", 3)
    monkeypatch.setattr(spikes, "_FAR", -100)
    assert main(flags(data, tmp_path, "--knn_every", 0)) == 0
    fourth = lines(tmp_path / "metrics.jsonl")[3]
    told = f"; entropy {fourth['entropy']:.3f}, reconstruction {fourth['reconstruction']:.3f}\n"
    (line,) = re.findall(r"step 4: the loss jumped to .*\n", capsys.readouterr().out)
    assert line.endswith(told)


def test_a_step_that_is_not_logged_after_a_resume_into_another_folder(straight, data, tmp_path):
    """There is no logged step to look at then, nor ever on a rank that writes no files."""
    given = flags(data, tmp_path, "--resume", straight[0], "--epochs", 4, "--log_every", 100, "--knn_every", 0)
    assert main(given) == 0
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [16]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_rollback_goes_on_from_the_last_checkpoint_in_another_order_and_so_does_a_resumed_run(
    data, tmp_path, capsys, monkeypatch, stage
):
    given = ("--knn_every", 0, "--saveckp_freq_steps", 2, "--max_skipped_steps", 2, "--zero_stage", stage)
    given = (*given, "--rollback", 1)
    _poison(monkeypatch, 4, 5)  # diverged at step 5; step 4's checkpoint is not published
    assert main(flags(data, tmp_path / "run", *given)) == 0
    out = capsys.readouterr().out
    assert out.count("skipped 2 steps in a row") == out.count(": rolled back to step 2 (1 of 1)\n") == 1
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rollbacks"], summary["skipped_steps"], summary["steps"]) == (1, 0, 8)
    monkeypatch.undo()
    assert main(flags(data, tmp_path / "plain", *given)) == 0
    losses = [[line["loss"] for line in lines(tmp_path / run / "metrics.jsonl")] for run in ("run", "plain")]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]
    _poison(monkeypatch, 4, 5)
    assert main(flags(data, tmp_path / "parts", *given, "--limit_steps", 6)) == 0
    assert main(flags(data, tmp_path / "parts", *given)) == 0
    assert [line["loss"] for line in lines(tmp_path / "parts" / "metrics.jsonl")] == losses[0]


def test_a_rollback_passes_over_a_broken_checkpoint(data, tmp_path, capsys, monkeypatch):
    def break_newest():
        file = tmp_path / "checkpoints" / "step-00000004" / "mp_rank_00_model_states.pt"
        file.write_bytes(file.read_bytes()[:-1])

    _poison(monkeypatch, 6)
    given = ("--knn_every", 0, "--saveckp_freq_steps", 2, "--keep", 2, "--max_skipped_steps", 1, "--rollback", 1)
    with _when_logged(5, break_newest):
        assert main(flags(data, tmp_path, *given)) == 0
    out = capsys.readouterr().out
    assert out.count("; going on from step-00000002\n") == out.count(": rolled back to step 2 (1 of 1)\n") == 1


def test_rollbacks_come_to_an_end_and_need_a_checkpoint(data, tmp_path, capsys, monkeypatch):
    given = ("--knn_every", 0, "--max_skipped_steps", 1, "--rollback", 2)
    _poison(monkeypatch, *range(4, 100))
    assert main(flags(data, tmp_path / "run", *given, "--saveckp_freq_steps", 3)) == 3
    captured = capsys.readouterr()
    assert captured.out.count(": rolled back to step 3 (") == 2
    assert captured.err.startswith("fasttrain: the loss is nan at step 4 (entropy nan, ")
    assert main(flags(data, tmp_path / "none", *given)) == 3
    assert "rolled back" not in capsys.readouterr().out


def _fail():
    raise RuntimeError("a bug\nof two lines")


def test_an_unexpected_error_is_one_line_a_traceback_in_the_run_and_status_1(data, tmp_path, capsys):
    with _when_logged(2, _fail):
        assert main(flags(data, tmp_path, "--knn_every", 0)) == 1
    log = tmp_path / "rank-0.log"
    said = f"fasttrain: rank 0 failed: RuntimeError: a bug; its traceback is in {log}\n"
    assert capsys.readouterr().err == said
    assert "in _fail" in log.read_text()
    assert "of two lines" in log.read_text()


def test_a_step_that_hangs_ends_the_run_with_status_1(data, tmp_path, capsys, monkeypatch):
    left = threading.Event()
    statuses = []

    def leave(status):
        statuses.append(status)
        left.set()

    def stalled():
        assert left.wait(60)
        raise RuntimeError("the process would have ended")

    monkeypatch.setattr(trainer, "Watchdog", partial(watchdog.Watchdog, leave=leave))
    with _when_logged(2, stalled):
        assert main(flags(data, tmp_path, "--knn_every", 0, "--watchdog_minutes", 0.05)) == 1
    assert statuses == [1]
    assert "in stalled" in (tmp_path / "rank-0.log").read_text()
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(
        "fasttrain: rank 0 finished no step for 0.05 minutes (--watchdog_minutes); the stacks of all "
    )


def test_first_and_last_steps_and_evaluated_ones_are_logged(data, tmp_path):
    """A line with k-NN once carried the loss of an earlier step, and after a resume there was none to carry."""
    given = flags(data, tmp_path, "--log_every", 100, "--knn_every", 1)
    assert main([*given, "--limit_steps", "2"]) == 0
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert main(given) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["epoch"]) for line in metrics] == [(1, 0.25), (2, 0.5), (4, 1), (8, 2)]
    assert len({line["loss"] for line in metrics}) == 4
    assert ["knn_top1" in line for line in metrics] == [False, False, True, False]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_resumes_what_it_wrote(straight, data, tmp_path, stage):
    """ZeRO 1 and 2 write a class of DeepSpeed's that the reader of tensors alone once refused."""
    given = flags(data, tmp_path, "--zero_stage", stage, "--knn_every", 1)
    assert main([*given, "--limit_steps", "3"]) == 0
    assert main(given) == 0
    expected = [line["loss"] for line in lines(straight[0] / "metrics.jsonl")]
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == pytest.approx(expected, rel=1e-3)


def test_bad_files_are_named_once_counted_and_left_out(data, tmp_path, capfd):
    root = tmp_path / "images"
    shutil.copytree(data, root)
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


def test_images_without_labels(data, tmp_path, capsys):
    given = flags(data / "train" / "cat", tmp_path, "--limit_steps", 2, "--knn_every", 1)
    assert main(given) == 0
    assert "no k-NN accuracy: the data has no labels" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [v for k, v in summary.items() if k.startswith("knn")] == [None, None, None]
    assert summary["rankme"] > 1
    assert summary["images"] == 16


@pytest.mark.parametrize("more", [[], ["--log_every", "100"]], ids=["every_step", "last_step"])
def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, capsys, more):
    assert main(flags(data, tmp_path, "--lr", "1e30", "--clip_grad", 0, "--knn_every", 1, *more)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: the loss is nan at step ")
    assert "; skipped 3 steps in a row; step 1 still had loss " in line
    assert "lower --lr" in line
    assert lines(tmp_path / "metrics.jsonl")[-1]["loss"] is None
    assert not (tmp_path / "checkpoints").exists()


def test_weights_that_the_last_step_broke_are_no_result(data, tmp_path, capsys):
    """The loss is measured before the step, so the last step's damage shows only in the evaluation."""
    assert main(flags(data, tmp_path, "--lr", "1e38", "--clip_grad", 0, "--limit_steps", 1, "--optimizer", "sgd")) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: the weights are not finite after step 1; lower --lr")


def test_broken_weights_are_not_published(data, tmp_path, capsys):
    """Infinite weights after the last step must leave the last good checkpoint the last."""
    assert main(flags(data, tmp_path, "--lr", "1e60", "--clip_grad", 0, "--limit_steps", 1, "--optimizer", "sgd")) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: the weights are not finite after step 1; lower --lr")
    assert not (tmp_path / "checkpoints").exists()


def _bad_yaml(folder):
    (folder / "broken.yaml").write_text("lr: [1, 2\nepochs: }")
    return ["--config", folder / "broken.yaml"]


def _text_as_images(folder):
    for i in range(12):
        (folder / f"{i}.jpg").write_text("no image")
    return ["--data_path", folder]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batchsize_per_gpu", "8"], "argument --batchsize_per_gpu is unknown; did you mean --batch_size_per_gpu?"),
        (["--temperatur=0.3"], "argument --temperatur is unknown; did you mean --temperature?"),
        (["--no-such-thing-at-all"], "argument --no_such_thing_at_all is unknown; --help lists them all"),
        (["--epochs", "three"], "argument --epochs: invalid int value: 'three'"),
        (["--epochs"], "argument --epochs: expected one argument"),
        (["--precision", "fp8"], "--precision: input should be 'auto', 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        (["--entropy", "maybe"], "argument --entropy: 'maybe' is neither true nor false"),
        (["--method", "simclar"], "method 'simclar' is unknown; choose one of .*simclr"),
        (["--recipe", "imagnet"], "recipe 'imagnet' is unknown for simclr; choose one of .*imagenet"),
        (["--arch", "resnet181"], "network 'resnet181' is unknown; did you mean resnet18 "),
        (["--arch", "vit_tiny", "--patch_size", "5"], "patch_size 5 does not divide the image of 32 pixels"),
        (["--data_path", "/no/such/folder"], "/no/such/folder: no such folder; check the data path"),
        (lambda folder: ["--data_path", folder], "no image found; looked for files ending in .jpg"),
        (_text_as_images, r"1\d of 1\d images cannot be read, more than .* 0.1 allowed .*.jpg: not an image"),
        (["--batch_size_per_gpu", "64"], "a batch of 64 images .* is larger than the data, 32 images; use a smaller"),
        (["--gradient_accumulation_steps", "5"], "a batch of 40 images is larger than the data .32.; lower"),
        (["--optimizer", "adam"], "optimizer 'adam' is unknown; did you mean adamw?"),
        (
            ["--zero_stage", "1", "--precision", "fp16"],
            "--precision fp16 cannot be used with --zero_stage 1, .*; use --precision bf16 or",
        ),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml cannot be read: No such file or directory"),
        (_bad_yaml, "--config .*broken.yaml is not YAML: "),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x cannot be made: "),
        (["--resume", "/no/such/run"], "--resume /no/such/run: no checkpoint there; pass a run's folder"),
        (["--data_path", "/no/such/*.tar"], "/no/such/.*.tar: no file matches; check the pattern"),
        (["--num_workers", "-1"], "--num_workers must be at least 0, got -1"),
        (["--max_skipped_steps", "0"], "--max_skipped_steps must be at least 1, got 0"),
        (["--watchdog_minutes", "-1"], "--watchdog_minutes must be a finite number of at least 0, got -1.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else getattr(value, "__name__", ""),
)
def test_what_cannot_be_used_is_one_line_and_status_2(data, tmp_path, capsys, more, message):
    (tmp_path / "given").mkdir()
    given = more(tmp_path / "given") if callable(more) else more
    assert main(flags(data, tmp_path / "run", *given)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: ")
    assert re.search(message, line), line


def test_a_method_is_needed(capsys):
    assert main([]) == 2
    assert "--method is missing; choose one of byol, cmc, deepcluster, dino" in capsys.readouterr().err


def _copy(run, folder):
    """A copy of a run that may be damaged: the run's folder and its checkpoint's file."""
    shutil.copytree(run, folder)
    return folder, folder / "checkpoints" / "step-00000008" / "mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arch", "test_resnet"], "is of arch 'conv_small', this run of 'test_resnet'"),
        (["--entropy"], "is of entropy False, this run of True"),
        (["--optimizer", "sgd"], "is of optimizer 'adamw', this run of 'sgd'"),
        (["--out_dim", "16"], "does not fit these settings .size mismatch for .*; use those of its run's config.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_checkpoint_of_another_run_is_refused(straight, data, tmp_path, capsys, more, message):
    assert main(flags(data, tmp_path, "--resume", straight[0], *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fasttrain: checkpoint {straight[0]}/checkpoints/step-00000008 ")
    assert "--resume never" in line
    assert re.search(message, line), line
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_of_another_method_is_refused(straight, data, tmp_path, capsys):
    assert main(flags(data, tmp_path, "--resume", straight[0], "--drop_path_rate", 0, method="dino")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of method 'simclr', this run of 'dino'; use that setting, another --output_dir, or --resume" in line


class _RunsCode:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(straight, data, tmp_path, capsys):
    run, file = _copy(straight[0], tmp_path / "run")
    marker = tmp_path / "marker"
    state = torch.load(file, weights_only=True)
    torch.save(state | {"lr_scheduler": _RunsCode(marker)}, file)
    card = json.loads((file.parent / "fasttrain.json").read_text())
    card["files"][file.name] = checksum(file)
    del card["crc32"]  # as an earlier version's
    (file.parent / "fasttrain.json").write_text(json.dumps(card))
    assert main(flags(data, run)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fasttrain: checkpoint {file.parent} holds more than tensors (")
    assert ".mkdir) and is not loaded: opening it could run code. If you trust it, save its tensors anew" in line
    assert line.endswith("; choose another or --resume never")
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # so the file would have done it


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(straight, data, tmp_path, capsys, damage):
    run, file = _copy(straight[0], tmp_path / "run")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        kept = {"truncated": content[: len(content) // 2], "empty": b"", "not a checkpoint": b"hello " * 1000}[damage]
        file.write_bytes(kept)
    assert main(flags(data, run)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fasttrain: checkpoint {file.parent} is broken: {file.name} ")
    assert line.endswith("; choose another or --resume never")
    assert len(lines(run / "metrics.jsonl")) == 8  # nothing of the run is lost


def test_a_broken_checkpoint_costs_the_steps_since_the_one_before(straight, data, tmp_path, capsys):
    given = flags(data, tmp_path, "--knn_every", 1, "--saveckp_freq_steps", 3, "--keep", 2)
    assert main([*given, "--limit_steps", "7"]) == 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006", "step-00000007"]
    file = tmp_path / "checkpoints" / "step-00000007" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    assert main(given) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search("step-00000007 is broken: mp_rank.* were written; going on from step-00000006", out), out
    assert_same_run(tmp_path, straight[0])


def test_a_run_goes_on_at_another_stage_with_another_batch(straight, data, tmp_path, capsys):
    """One epoch at ZeRO 3 and batches of 8, the next at ZeRO 1 in two micro-steps of 4: the same images a step."""
    given = flags(data, tmp_path, "--knn_every", 1)
    assert main([*given, "--zero_stage", "3", "--limit_steps", "4"]) == 0
    shutil.copytree(tmp_path, tmp_path / "larger")
    more = ["--zero_stage", "1", "--batch_size_per_gpu", "4", "--gradient_accumulation_steps", "2"]
    assert main([*given, *more]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint is of 1 rank(s) at ZeRO 3, and was cut anew for 1 rank(s) at ZeRO 1" in out
    assert "a step has" not in out
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    given = flags(data, tmp_path / "larger", "--knn_every", 1, "--batch_size_per_gpu", "16", "--epochs", "4")
    assert main(given) == 0
    assert "a step has 16 images now, 8 in the checkpoint" in " ".join(capsys.readouterr().out.split())


def test_a_card_says_where_the_checkpoint_comes_from(straight):
    card = json.loads((straight[0] / "checkpoints" / "step-00000008" / "fasttrain.json").read_text())
    assert card["batch"] == 8
    assert set(card["origin"]) == {"config", "commit", "torch", "deepspeed"}
    assert card["origin"]["torch"] == torch.__version__
    assert list(card["files"]) == ["mp_rank_00_model_states.pt"]


@pytest.mark.parametrize("folder", ["/proc/self", "/sys/kernel"])
def test_a_folder_that_cannot_be_written_to_is_known_before_training(data, capsys, folder):
    assert main(flags(data, folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"fasttrain: --output_dir {folder} cannot be written to: .*; choose another", line), line


@pytest.mark.parametrize("at", ["checkpoint", "metrics"])
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(data, tmp_path, capsys, monkeypatch, at):
    """The first checkpoint finds room, the second does not; or a line of metrics.jsonl does not."""
    name = os.fsencode(tmp_path / at) if at == "metrics" else str(tmp_path / at)  # as TensorBoard's are
    full = OSError(errno.ENOSPC, "No space left on device", name)
    publish, write = checkpoint.write_tensors, Recorder.step

    def tensors(path, content):
        if at == "checkpoint" and "step-00000004" in str(path):
            raise full
        return publish(path, content)

    def step(self, values):
        if at == "metrics" and values["step"] == 4:
            raise full
        write(self, values)

    monkeypatch.setattr(checkpoint, "write_tensors", tensors)
    monkeypatch.setattr(Recorder, "step", step)
    given = flags(data, tmp_path / "run", "--knn_every", 0, "--saveckp_freq_steps", 2)
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line
    assert "make room" in line
    assert "b'" not in line
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*step*")] == ["step-00000002"]
    monkeypatch.undo()
    assert main([*given, "--limit_steps", "5"]) == 0
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_wrong_flag_from_the_shell():
    start = (sys.executable, "-c", "import sys; from fasttrain.cli import main; sys.exit(main())")
    process = _command(["train", "--method", "simclr", "--epoch", "3"], *start)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err == "fasttrain: argument --epoch is unknown; did you mean --epochs?\n"


def test_help_names_every_flag_of_the_method(capsys):
    for arguments, there, not_there in (
        (["--help"], "--batch_size_per_gpu", "--temperature"),
        (["--method", "simclr", "-h"], "--temperature", "--teacher_temp"),
        (["--method", "dino", "--help"], "--teacher_temp", "--temperature"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert there in out
        assert not_there not in out


def test_print_config_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "train", lambda *_: pytest.fail("trained"))
    assert main(["--method", "simclr", "--print-config", "--batch-size-per-gpu=16"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["method"], printed["recipe"], printed["batch_size_per_gpu"]) == ("simclr", "demo", 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "told"), [("dino", ""), ("dino", "-er")])
def test_the_default_output_folder_says_what_ran(tmp_path, monkeypatch, name, told):
    from fasttrain.command_line import parse
    from fasttrain.distributed import World

    monkeypatch.chdir(tmp_path)
    config, _ = parse(["--method", name, *(["--entropy"] if told else [])])
    path = recorder.output_folder(config, World(0, 1, 0, 1))
    assert path.is_dir()
    assert path.parent.name == "runs"
    assert path.name.startswith(f"{name}{told}-2")


def test_commands(capsys, monkeypatch):
    assert cli.main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    known = "train, plan, eval, export, report or doctor"
    assert capsys.readouterr().err == f"fasttrain: command 'trian' is unknown; choose {known}\n"
    assert cli.main(["train", "--method", "simclr", "--print_config"]) == 0
    assert capsys.readouterr().out.startswith("method: simclr\n")
    monkeypatch.setattr("fasttrain.doctor.main", lambda _: 7)
    assert cli.main(["doctor"]) == 7
