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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h300"], "--gpu 'h300' is unknown; choose one of a100-40, a100-80, h100, h200, b200"),
        (["--nodes", "0"], "--nodes must be at least 1, got 0"),
        (["--gpus_per_node", "many"], "argument --gpus_per_node: invalid int value: 'many'"),
        (["--gpu_memory", "0"], "argument --gpu_memory: 0 is not above 0"),
        (["--flops_fraction", "2"], "argument --flops_fraction: 2 is above 1"),
        (["--nodes", "100000"], "a batch of 51200000 images is larger than the data (1281167);"),
        (["--archh", "x"], "argument --archh is unknown; did you mean --arch?"),
        (["--arch", "vit_smal"], "network 'vit_smal' is unknown; did you mean "),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    assert cli.main([*_SMALL, "--batch_size_per_gpu", "64", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"fasttrain: {message}")
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_an_output_that_cannot_be_written(capsys):
    assert cli.main([*_SMALL, "--output", "/nowhere/plan.json"]) == 2
    error = capsys.readouterr().err
    assert error == "fasttrain: --output /nowhere/plan.json cannot be written: there is no folder /nowhere\n"


def test_an_output_that_is_a_folder(tmp_path, capsys):
    with pytest.raises(ConfigError, match=f"--output {tmp_path} cannot be written: Is a directory"):
        _write(tmp_path, planned([*_SMALL[1:], "--nodes", "1"]))


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "--gpus_per_node" in out
    assert "fasttrain train" in out
