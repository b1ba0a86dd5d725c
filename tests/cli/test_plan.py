"""The command: the trainer's flags and its own, tables, JSON, and one line for what cannot be used."""

import json

import pytest

from fasttrain import cli
from fasttrain.cli.plan import IMAGENET, _write, planned
from fasttrain.errors import ConfigError

_SMALL = ["plan", "--method", "dino", "--recipe", "cifar", "--arch", "conv_small", "--out_dim", "64"]


def test_tables_assumptions_and_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    flags = ["--nodes", "2", "--gpus-per-node=4", "--gpu", "a100-80", "--batch-size-per-gpu", "16", "--output", path]
    assert cli.main([*_SMALL, *map(str, flags)]) == 0
    out = capsys.readouterr().out
    for text in ("2 x 4 a100-80", "GiB on each GPU", "activations", "ZeRO 3", "images/s", "GPU-hours", "all-reduce"):
        assert text in out
    assert "nothing here was measured on a GPU" in out
    assert out.endswith("Run it with --zero_stage 0.\n")
    actual = json.loads(path.read_text())
    assert actual["global_batch"] == 2 * 4 * 16
    assert actual["images"] == IMAGENET
    assert actual["steps"] == actual["epochs"] * (IMAGENET // 128)
    assert actual["chosen_stage"] == 0
    for stage in actual["stages"]:
        moments = [sum(part[moment] for part in stage["parts"]) for moment in ("backward", "update")]
        assert stage["bytes"] == max(moments)
        assert stage["gpu_hours"] == pytest.approx(8 * 24 * stage["days"])
        assert stage["images_per_s"] == pytest.approx(128 / stage["seconds"]["step"])
    for line in actual["assumptions"]:
        assert line.split(";")[0] in out


def test_the_recipe_is_imagenet_s_on_512_gpus(capsys):
    assert cli.main(["plan", "--method", "simclr", "--arch", "conv_small", "--nodes", "64"]) == 0
    out = capsys.readouterr().out
    assert "64 x 8 h100; 128 images a GPU, 65,536 a step; 100 epochs of 1,281,167 images" in out
    assert "loss and centre" in out


def test_what_does_not_fit_is_shown_and_said_in_one_line(capsys):
    assert cli.main([*_SMALL, "--gpu_memory", "3.01"]) == 2
    captured = capsys.readouterr()
    assert "too much" in captured.out
    assert "Run it" not in captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("fasttrain: conv_small with ")


def test_an_output_that_is_a_folder(tmp_path, capsys):
    with pytest.raises(ConfigError, match=f"--output {tmp_path}"):
        _write(tmp_path, planned([*_SMALL[1:], "--nodes", "1"]))
