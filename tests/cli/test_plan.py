"""``fasttrain plan``: the trainer's flags and its own, tables, JSON, and one line for a run that does not fit."""

import json

import pytest

from fasttrain.cli import main
from fasttrain.cli.plan import IMAGENET

_SMALL = ["plan", "--method", "dino", "--recipe", "cifar", "--arch", "conv_small", "--out_dim", "64"]


def test_plan_prints_tables_and_writes_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    flags = ["--nodes", "2", "--gpus-per-node=4", "--gpu", "a100-80", "--batch-size-per-gpu", "16", "--output", path]
    assert main([*_SMALL, *map(str, flags)]) == 0
    out = capsys.readouterr().out
    for text in ("2 x 4 a100-80", "GiB per GPU", "activations", "ZeRO 3", "images/s", "GPU-hours", "all-reduce"):
        assert text in out
    assert out.endswith("--zero_stage 0.\n")
    content = json.loads(path.read_text())
    assert (content["global_batch"], content["images"], content["chosen_stage"]) == (2 * 4 * 16, IMAGENET, 0)
    assert content["steps"] == content["epochs"] * (IMAGENET // 128)
    for stage in content["stages"]:
        moments = [sum(part[moment] for part in stage["parts"]) for moment in ("backward", "update")]
        assert stage["bytes"] == max(moments)
        assert stage["gpu_hours"] == pytest.approx(8 * 24 * stage["days"])
        assert stage["images_per_s"] == pytest.approx(128 / stage["seconds"]["step"])
    assert all(line in out for line in content["assumptions"])


def test_plan_without_recipe_uses_imagenet_s(capsys):
    assert main(["plan", "--method", "simclr", "--arch", "conv_small", "--nodes", "64"]) == 0
    out = capsys.readouterr().out
    assert "64 x 8 h100; 128 images per GPU, 65,536 per step; 100 epochs of 1,281,167 images" in out
    assert "loss and centre" in out


def test_plan_of_a_run_that_does_not_fit_has_status_2(capsys):
    assert main([*_SMALL, "--gpu_memory", "3.01"]) == 2
    out, err = capsys.readouterr()
    assert "too much" in out
    assert "Use --zero_stage" not in out
    (line,) = err.splitlines()
    assert line.startswith("fasttrain: --gpu h100: ")


def test_plan_into_a_folder_s_path_is_refused(tmp_path, capsys):
    assert main([*_SMALL, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"fasttrain: --output {tmp_path}: ")
