"""The command of a report repeats the run's configuration."""

import dataclasses
import shlex

import pytest

from fasttrain.config.arguments import parse
from fasttrain.config.resolve import read_yaml, resolve
from fasttrain.report.rerun import command, differences
from fasttrain.report.runs import Run, read_run
from tests.methods.small import CASES


def _run(tmp_path, *arguments, summary=None):
    """Return a run with only a configuration, read from its file."""
    config, _ = parse(list(arguments))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    values = read_yaml(tmp_path / "config.yaml")
    return Run(tmp_path, "it", (), summary, resolve(config.method, {}, values), config.to_yaml(), None)


def _parsed(words):
    """Return the configuration of a command line, without the output folder."""
    config, _ = parse(words)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, output_dir=None))


def _words(run):
    words = shlex.split(command(run))
    assert words[:2] == ["fasttrain", "train"]
    return words[2:]


@pytest.mark.parametrize(("method", "entropy"), CASES)
def test_command_repeats_the_configuration_of_every_method(tmp_path, method, entropy):
    flags = [
        "--method",
        method,
        *["--entropy"] * entropy,
        "--epochs",
        "7",
        "--deterministic",
        "--lr_drops",
        "3",
        "5",
        "--seed",
        "4",
    ]
    words = _words(_run(tmp_path, *flags, "--output_dir", str(tmp_path)))
    assert not {"--config", "--output_dir"} & set(words)
    assert {"--epochs", "--lr_drops", "--seed"} <= set(words)
    assert _parsed(words) == _parsed(["--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    "flags",
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
def test_command_has_flags_for_recipes_paths_and_views(tmp_path, flags):
    words = _words(_run(tmp_path, "--method", "dino", *flags))
    assert _parsed(words) == _parsed(["--config", str(tmp_path / "config.yaml")])
    assert "--config" not in words


def test_command_reads_the_run_s_file_if_flags_are_not_enough(tmp_path):
    _run(tmp_path, "--method", "dino")
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("blur: 0.5", "blur: 0.25"))
    run = Run(tmp_path, "it", (), None, resolve("dino", {}, read_yaml(file)), "", None)
    words = _words(run)
    assert words == ["--config", str(file), "--output_dir", f"{tmp_path}-again"]
    assert _parsed(words) == run.config
    assert differences([run])[1] == [["views[0].blur", "0.25", "0.5"]]


def test_command_has_the_number_of_ranks(tmp_path):
    run = _run(tmp_path, "--method", "simclr", summary={"world_size": 4})
    assert command(run).startswith("torchrun --nproc_per_node 4 --no-python fasttrain train --method simclr")


def test_command_without_configuration_is_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2.0}\n')
    assert command(read_run(tmp_path, "it")) is None


def test_differences_between_runs_and_from_the_recipe(tmp_path):
    flags = {"a": ["dino"], "b": ["dino", "--lr", "0.25", "--out_dim", "32"], "c": ["simclr"]}
    runs = []
    for name, words in flags.items():
        (tmp_path / name).mkdir()
        runs.append(_run(tmp_path / name, "--method", *words))
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
