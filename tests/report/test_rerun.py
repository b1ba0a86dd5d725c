"""The command of a report gives the run's configuration again."""

import dataclasses
import shlex

import pytest

from fasttrain.config.arguments import parse
from fasttrain.config.resolve import read_yaml, resolve
from fasttrain.config.settings import VIEW_FLAGS
from fasttrain.methods import names
from fasttrain.report.rerun import command, differences
from fasttrain.report.runs import Run, read_run


def _run(tmp_path, *arguments, summary=None):
    """A run of which there is only the configuration, as it is read back from its file."""
    config, _ = parse(list(arguments))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    values = read_yaml(tmp_path / "config.yaml")
    return Run(tmp_path, "it", (), summary, resolve(config.method, {}, values), config.to_yaml(), None)


def _reached(words):
    """What the words give, apart from where it is written; flags of views are in the views."""
    config, _ = parse(words)
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, **dict.fromkeys(("output_dir", *VIEW_FLAGS)))
    )


@pytest.mark.parametrize("entropy", [[], ["--entropy"]])
@pytest.mark.parametrize("method", names())
def test_flags_give_the_configuration_of_every_method(tmp_path, method, entropy):
    given = ["--method", method, *entropy, "--epochs", "7", "--deterministic", "--lr_drops", "3", "5", "--seed", "4"]
    run = _run(tmp_path, *given, "--output_dir", str(tmp_path))
    words = shlex.split(command(run))
    assert words[:2] == ["fasttrain", "train"]
    assert "--config" not in words
    assert {"--epochs", "--lr_drops", "--seed"} <= set(words)
    assert _reached(words[2:]) == _reached(["--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    "given",
    [
        ["--recipe", "cifar", "--data_path", "/some where/images", "--val_path", "/v"],
        ["--data_path", "/d", "--recipe", "imagenet"],
        ["--recipe", "imagenet-vit_base_16"],
        ["--norm_last_layer", "false", "--use_bn_in_head"],
        ["--resume", "/another/run", "--init_from", "/some.safetensors"],
        ["--global_crops_scale", "0.5", "1"],
        ["--local_crops_number", "0", "--recipe", "imagenet"],
        ["--local_crops_number", "3", "--local_crops_size", "64", "--recipe", "imagenet"],
    ],
)
def test_recipes_paths_and_views(tmp_path, given):
    run = _run(tmp_path, "--method", "dino", *given)
    words = shlex.split(command(run))[2:]
    assert _reached(words) == _reached(["--config", str(tmp_path / "config.yaml")])
    assert "--config" not in words


def test_what_flags_cannot_say_is_read_from_the_runs_file(tmp_path):
    _run(tmp_path, "--method", "dino")
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("blur: 0.5", "blur: 0.25"))
    run = Run(tmp_path, "it", (), None, resolve("dino", {}, read_yaml(file)), "", None)
    words = shlex.split(command(run))[2:]
    assert words == ["--config", str(file), "--output_dir", f"{tmp_path}-again"]
    assert _reached(words) == run.config
    assert differences([run])[1] == [["views[0].blur", "0.25", "0.5"]]


def test_another_folder_is_written_to(tmp_path):
    assert "--output_dir" not in command(_run(tmp_path, "--method", "dino", "--output_dir", str(tmp_path)))


def test_as_many_ranks(tmp_path):
    run = _run(tmp_path, "--method", "simclr", summary={"world_size": 4})
    assert command(run).startswith("torchrun --nproc_per_node 4 --no-python fasttrain train --method simclr")


def test_differences_of_runs_and_of_one_from_its_recipe(tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    for folder in (first, second, third):
        folder.mkdir()
    runs = [
        _run(first, "--method", "dino"),
        _run(second, "--method", "dino", "--lr", "0.25", "--out_dim", "32"),
        _run(third, "--method", "simclr"),
    ]
    heads, rows = differences(runs[:2])
    assert heads == ["setting", "it", "it"]
    assert [row[0] for row in rows] == ["lr", "out_dim"]
    assert rows[1] == ["out_dim", "2048", "32"]
    settings = {row[0]: row[1:] for row in differences(runs)[1]}
    assert settings["method"] == ["dino", "dino", "simclr"]
    assert "temperature" not in settings  # only SimCLR has one
    heads, rows = differences(runs[1:2])
    assert heads == ["setting", "this run", "recipe demo"]
    assert [row[0] for row in rows] == ["lr", "out_dim"]


def test_a_run_without_configuration_has_no_command(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2.0}\n')
    assert command(read_run(tmp_path, "it")) is None
