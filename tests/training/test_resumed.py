"""Resumed runs: at the same and other ZeRO stages, and refused checkpoints."""

import json
import re
import shutil

import pytest
import torch

from fasttrain.pretrained import from_run
from fasttrain.run import main
from tests.small_runs import assert_same_run, flags, lines, write_images

pytestmark = pytest.mark.usefixtures("one_thread")


def test_resume_gives_the_run_in_one_go(straight, images, tmp_path, capsys):
    assert main(flags(images, tmp_path, "--knn_every", 1, "--limit_steps", 3)) == 0  # in mid-epoch
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3
    leftover = tmp_path / "checkpoints" / ".step-00000005.part"  # of a run that was killed
    leftover.mkdir()
    assert main(flags(images, tmp_path, "--knn_every", 1)) == 0
    assert "resumed after step 3" in capsys.readouterr().out
    assert_same_run(tmp_path, straight[0])
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-00000008"}


def test_stochastic_depth_is_drawn_alike_after_a_resume(images, tmp_path):
    more = ["--arch", "test_convnext", "--drop_path_rate", "0.5", "--knn_every", 0, "--limit_steps"]
    assert main(flags(images, tmp_path / "straight", *more, 4)) == 0
    assert main(flags(images, tmp_path / "parts", *more, 2)) == 0
    assert main(flags(images, tmp_path / "parts", *more, 4)) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "straight")


def test_a_finished_run_stays_as_it_is(straight, images, tmp_path):
    shutil.copytree(straight[0], tmp_path / "copy")
    assert main(flags(images, tmp_path / "copy", "--knn_every", 1)) == 0
    assert_same_run(tmp_path / "copy", straight[0])
    before, after = ((o / "summary.json").read_text() for o in (straight[0], tmp_path / "copy"))
    assert after == before  # its times too


def test_changed_settings_of_a_run_are_reported(straight, images, tmp_path, capsys):
    shutil.copytree(straight[0], tmp_path / "copy")
    arguments = flags(images, tmp_path / "copy", "--knn_every", 1)
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    assert main([*arguments, "--lr", "0.25"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "lr" in line
    assert "-> 0.25 has no effect" in line
    assert main([*arguments, "--seed", "9", "--epochs", "3"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "changed setting seed 0 -> 9" in out
    assert "changed setting epochs 2 -> 3" in out


def test_a_shorter_limit_than_what_was_made_is_no_harm(straight, images, tmp_path):
    assert main(flags(images, tmp_path, "--resume", straight[0], "--limit_steps", 2)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["images_per_s"] == 0


def test_resume_into_another_folder_at_an_unlogged_step(straight, images, tmp_path):
    """There is no logged step to look at then, nor ever on a rank that writes no files."""
    arguments = flags(images, tmp_path, "--resume", straight[0], "--epochs", 4, "--log_every", 100, "--knn_every", 0)
    assert main(arguments) == 0
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [12, 16]


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_every_zero_stage_resumes_what_it_wrote(straight, images, tmp_path, stage):
    """ZeRO 1 and 2 write a class of DeepSpeed's that the reader of tensors alone once refused."""
    arguments = flags(images, tmp_path, "--zero_stage", stage, "--knn_every", 1)
    assert main([*arguments, "--limit_steps", "3"]) == 0
    assert main(arguments) == 0
    expected = [line["loss"] for line in lines(straight[0] / "metrics.jsonl")]
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == pytest.approx(expected, rel=1e-3)


def test_a_run_goes_on_at_another_stage_with_another_batch(straight, images, tmp_path, capsys):
    """One epoch at ZeRO 3 and batches of 8, the next at ZeRO 1 in two micro-steps of 4: equal images per step."""
    arguments = flags(images, tmp_path, "--knn_every", 1)
    assert main([*arguments, "--zero_stage", "3", "--limit_steps", "4"]) == 0
    shutil.copytree(tmp_path, tmp_path / "larger")
    more = ["--zero_stage", "1", "--batch_size_per_gpu", "4", "--gradient_accumulation_steps", "2"]
    assert main([*arguments, *more]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "resharded the checkpoint from 1 rank (ZeRO 3) to 1 rank (ZeRO 1)" in out
    assert "a step has" not in out
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    arguments = flags(images, tmp_path / "larger", "--knn_every", 1, "--batch_size_per_gpu", "16", "--epochs", "4")
    assert main(arguments) == 0
    assert "a step has 16 images, 8 in the checkpoint" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("images_now", [48, 24])
def test_schedules_do_not_jump_back_with_other_images(tmp_path, capsys, images_now):
    """Epoch and learning rate jumped back, because finished steps counted as steps of the new epochs."""
    data, output = write_images(tmp_path / "data"), tmp_path / "run"
    arguments = flags(data, output, "--knn_every", 0, "--epochs", 3, "--warmup_epochs", 0)
    assert main([*arguments, "--limit_steps", "6"]) == 0
    shutil.rmtree(data)
    write_images(data, train=images_now)
    assert main([*arguments, "--limit_steps", "7"]) == 0
    assert main(arguments) == 0  # the third part of the run has the same data as the second
    steps, epochs, rates = zip(
        *((x["step"], x["epoch"], x["lr"]) for x in lines(output / "metrics.jsonl")), strict=True
    )
    per_epoch = images_now // 8
    assert epochs[5:] == (1.5, *((k + 1) / per_epoch for k in range(-(-3 * per_epoch // 2), 3 * per_epoch)))
    assert steps == tuple(range(1, len(epochs) + 1))
    assert list(rates) == sorted(rates, reverse=True)
    assert json.loads((output / "summary.json").read_text())["epochs"] == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "in the checkpoint" in line]
    assert line.startswith(f"the data has {images_now} images, 32 in the checkpoint: ")


def test_broken_checkpoint_falls_back_to_the_one_before(straight, images, tmp_path, capsys):
    arguments = flags(images, tmp_path, "--knn_every", 1, "--saveckp_freq_steps", 3, "--keep", 2)
    assert main([*arguments, "--limit_steps", "7"]) == 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006", "step-00000007"]
    file = tmp_path / "checkpoints" / "step-00000007" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    assert main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search("step-00000007: .*corrupt: mp_rank.*; resuming from step-00000006", out), out
    assert_same_run(tmp_path, straight[0])


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
        (["--out_dim", "16"], "does not fit these settings .size mismatch for "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_checkpoint_of_another_run_is_refused(straight, images, tmp_path, capsys, more, message):
    assert main(flags(images, tmp_path, "--resume", straight[0], *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fasttrain: {straight[0]}/checkpoints/step-00000008: ")
    assert "--resume never" in line
    assert re.search(message, line), line
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_of_another_method_is_refused(straight, images, tmp_path, capsys):
    assert main(flags(images, tmp_path, "--resume", straight[0], "--drop_path_rate", 0, method="dino")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of method 'simclr', this run of 'dino'" in line


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(straight, images, tmp_path, capsys, damage):
    run, file = _copy(straight[0], tmp_path / "run")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        kept = {"truncated": content[: len(content) // 2], "empty": b"", "not a checkpoint": b"hello " * 1000}[damage]
        file.write_bytes(kept)
    assert main(flags(images, run)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fasttrain: {file.parent}: the checkpoint is corrupt: {file.name} ")
    assert line.endswith("--resume never.")
    assert len(lines(run / "metrics.jsonl")) == 8  # nothing of the run is lost


def test_weights_with_nan_are_refused_before_the_training(simclr_run, images, tmp_path, capsys):
    """The run diverged, and its line advised a lower learning rate."""
    tensors = from_run(simclr_run).network.state_dict()
    next(iter(tensors.values()))[0] = float("nan")
    torch.save(tensors, tmp_path / "x.pth")
    assert main(flags(images, tmp_path / "run", "--init_from", tmp_path / "x.pth")) == 2
    assert "NaN" in capsys.readouterr().err
