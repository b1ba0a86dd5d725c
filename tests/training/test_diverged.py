"""A run with values that are not finite: skipped steps, rollbacks, spikes, and checkpoints that are not saved."""

import json
import math
import re
import time

import pytest
import torch

from fasttrain.run import main
from fasttrain.training import monitors
from fasttrain.training.loop import Loop
from tests.small_runs import flags, lines, weights, when_logged

pytestmark = pytest.mark.usefixtures("one_thread")


def _poison(monkeypatch, *calls):
    """Put NaN into some batches, numbered from 1 over all runs of a test."""
    once, made = Loop._next, iter(range(1, 1000))

    def poisoned(self, batches, meter):
        batch = once(self, batches, meter)
        if next(made) in calls:
            batch.views[0][0, 0].fill_(math.nan)
        return batch

    monkeypatch.setattr(Loop, "_next", poisoned)


def test_bad_batch_is_skipped_counted_and_known_after_a_resume(images, tmp_path, capsys, monkeypatch):
    arguments = ("--knn_every", 0, "--log_every", 2)
    _poison(monkeypatch, 3, 5, 8 + 3, 8 + 5)
    assert main(flags(images, tmp_path / "straight", *arguments)) == 0
    out = capsys.readouterr().out
    for step in (3, 5):
        assert out.count(f"skipped: the loss is nan at step {step}\n") == 1
    assert main(flags(images, tmp_path / "parts", *arguments, "--limit_steps", 3)) == 0
    assert main(flags(images, tmp_path / "parts", *arguments)) == 0
    for run in ("straight", "parts"):
        metrics = [line for line in lines(tmp_path / run / "metrics.jsonl") if line["step"] % 2 == 0]
        assert [(line["step"], line["skipped_steps"]) for line in metrics] == [(2, 0), (4, 1), (6, 2), (8, 2)]
        assert json.loads((tmp_path / run / "summary.json").read_text())["skipped_steps"] == 2
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "straight")
    assert [path for path in ours if not torch.equal(ours[path], theirs[path])] == []


def test_skipped_step_is_left_out_of_the_epoch_mean(images, tmp_path, monkeypatch):
    _poison(monkeypatch, 3)
    assert main(flags(images, tmp_path, "--knn_every", 0)) == 0
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["loss"] is None for line in metrics] == [step == 3 for step in range(1, 9)]
    first = lines(tmp_path / "log.txt")[0]
    assert first["train_loss"] == pytest.approx(sum(metrics[i]["loss"] for i in (0, 1, 3)) / 3)


def test_spike_is_reported_with_entropy_and_reconstruction(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(monitors, "_MIN_WINDOW", 3)
    monkeypatch.setattr(monitors, "_SPIKE", -100)
    assert main(flags(images, tmp_path, "--knn_every", 0)) == 0
    fourth = lines(tmp_path / "metrics.jsonl")[3]
    terms = f"; entropy {fourth['entropy']:.3f}, reconstruction {fourth['reconstruction']:.3f}\n"
    (line,) = re.findall(r"step 4: the loss jumped to .*\n", capsys.readouterr().out)
    assert line.endswith(terms)


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_rollback_resumes_the_last_checkpoint_in_another_order(images, tmp_path, capsys, monkeypatch, stage):
    arguments = ("--knn_every", 0, "--saveckp_freq_steps", 2, "--max_skipped_steps", 2, "--zero_stage", stage)
    arguments = (*arguments, "--rollback", 1)
    _poison(monkeypatch, 4, 5)  # diverged at step 5; step 4's checkpoint is not published
    assert main(flags(images, tmp_path / "run", *arguments)) == 0
    out = capsys.readouterr().out
    assert out.count("skipped 2 consecutive steps") == out.count("Rolled back to step 2 (1 of 1).") == 1
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rollbacks"], summary["skipped_steps"], summary["steps"]) == (1, 0, 8)
    monkeypatch.undo()
    assert main(flags(images, tmp_path / "plain", *arguments)) == 0
    losses = [[line["loss"] for line in lines(tmp_path / run / "metrics.jsonl")] for run in ("run", "plain")]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]
    _poison(monkeypatch, 4, 5)
    assert main(flags(images, tmp_path / "parts", *arguments, "--limit_steps", 6)) == 0
    assert main(flags(images, tmp_path / "parts", *arguments)) == 0
    assert [line["loss"] for line in lines(tmp_path / "parts" / "metrics.jsonl")] == losses[0]


def test_rollback_skips_a_corrupt_checkpoint(images, tmp_path, capsys, monkeypatch):
    def break_newest():
        file = tmp_path / "checkpoints" / "step-00000004" / "mp_rank_00_model_states.pt"
        deadline = time.monotonic() + 60
        while (tmp_path / "checkpoints" / "latest").read_text() != "step-00000004":  # it is written in the background
            assert time.monotonic() < deadline
            time.sleep(0.01)
        file.write_bytes(file.read_bytes()[:-1])

    _poison(monkeypatch, 6)
    arguments = ("--knn_every", 0, "--saveckp_freq_steps", 2, "--keep", 2, "--max_skipped_steps", 1, "--rollback", 1)
    with when_logged(5, break_newest):
        assert main(flags(images, tmp_path, *arguments)) == 0
    out = capsys.readouterr().out
    assert out.count("step-00000002") >= out.count("Rolled back to step 2 (1 of 1).") == 1


def test_rollbacks_are_limited_and_need_a_checkpoint(images, tmp_path, capsys, monkeypatch):
    arguments = ("--knn_every", 0, "--max_skipped_steps", 1, "--rollback", 2)
    _poison(monkeypatch, *range(4, 100))
    assert main(flags(images, tmp_path / "run", *arguments, "--saveckp_freq_steps", 3)) == 3
    captured = capsys.readouterr()
    assert captured.out.count("Rolled back to step 3 (") == 2
    assert captured.err.startswith("fasttrain: the loss is nan at step 4 (entropy nan, ")
    assert main(flags(images, tmp_path / "none", *arguments)) == 3
    assert "Rolled back" not in capsys.readouterr().out
    # What another run has left in the folder is not gone back to.
    assert main(flags(images, tmp_path / "run", *arguments, "--resume", "never")) == 3
    assert "Rolled back" not in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--log_every", "100"]], ids=["every_step", "last_step"])
def test_loss_that_stays_nan_stops_the_run(images, tmp_path, capsys, more):
    assert main(flags(images, tmp_path, "--lr", "1e30", "--clip_grad", 0, "--knn_every", 1, *more)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: the loss is nan at step ")
    assert "skipped 3 consecutive steps" in line
    assert "--lr" in line
    assert lines(tmp_path / "metrics.jsonl")[-1]["loss"] is None
    assert not (tmp_path / "checkpoints").exists()


def test_broken_weights_are_not_published(images, tmp_path, capsys):
    """Infinite weights after the last step must leave the last good checkpoint the last."""
    assert (
        main(flags(images, tmp_path, "--lr", "1e60", "--clip_grad", 0, "--limit_steps", 1, "--optimizer", "sgd")) == 3
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fasttrain: the weights are not finite after step 1")
    assert not (tmp_path / "checkpoints").exists()
