"""The command line: every setting is a flag, in the spellings of torchrun, DeepSpeed and DINO."""

import dataclasses

import pytest

from fasttrain import methods
from fasttrain.config.arguments import parse
from fasttrain.config.settings import PixelFlags, TrainConfig, ViewFlags
from fasttrain.errors import ConfigError
from fasttrain.methods.registry import BUILT_IN


def _parse(*arguments):
    return parse([str(a) for a in arguments])[0]


@pytest.mark.parametrize("method", BUILT_IN)
def test_every_setting_is_a_flag_with_dashes_or_underscores(capsys, method):
    with pytest.raises(SystemExit):
        _parse("--method", method, "--help")
    page = capsys.readouterr().out
    for cls in (TrainConfig, ViewFlags, PixelFlags, methods.load(method).Settings):
        for field in dataclasses.fields(cls):
            assert f"--{field.name}" in page
            if field.type not in ("bool", "bool | None", "tuple[float, ...]", "tuple[Positive, ...]"):
                for spelling in (field.name, field.name.replace("_", "-")):
                    with pytest.raises(ConfigError, match=f"--{field.name}: expected "):
                        _parse("--method", method, f"--{spelling}")


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--batch-size-per-gpu", "8"], "batch_size_per_gpu", 8),
        (["--batch-size-per-gpu=8"], "batch_size_per_gpu", 8),
        (["--data-path", "my-own--images"], "data_path", "my-own--images"),
        (["--output-dir=a-b"], "output_dir", "a-b"),
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--zero_stage", "2"], "zero_stage", 2),
        (["--precision", "bf16"], "precision", "bf16"),
        (["--deterministic"], "deterministic", True),
        (["--zero_stage", "3", "--overlap_comm", "false"], "overlap_comm", False),
        (["--deterministic", "no"], "deterministic", False),
        (["--deterministic=TRUE"], "deterministic", True),
        (["--lr", "1", "--lr", "2"], "lr", 2.0),
        (["--lr_drops", "120", "160"], "lr_drops", (120.0, 160.0)),
        (["--lr_drops"], "lr_drops", ()),
        (["--data_path", "a", "b", "--data_weights", "3", "0.5"], "data_path", ("a", "b")),
        (["--data_weights", "3", "0.5", "--data-path", "a", "b"], "data_weights", (3.0, 0.5)),
        (["--val_path=a"], "val_path", "a"),
    ],
)
def test_flag_sets_the_value_in_its_type(arguments, name, value):
    parsed = getattr(_parse("--method", "dino", *arguments).train, name)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("arguments", [["--local_rank=0"], ["--local-rank", "3"], ["--local_rank", "0"]])
def test_flag_of_the_launcher_changes_nothing(arguments):
    assert _parse("--method", "dino", *arguments) == _parse("--method", "dino")


@pytest.mark.parametrize(
    ("arguments", "entropy"),
    [([], False), (["--entropy"], True), (["--entropy", "true"], True), (["--entropy=0"], False)],
)
def test_entropy_flag_overrides_the_file(tmp_path, arguments, entropy):
    assert _parse("--method", "dino", *arguments).entropy is entropy
    file = tmp_path / "settings.yaml"
    file.write_text("method: dino\nentropy: true\n")
    assert _parse("--config", file, *arguments).entropy is (entropy or not arguments)


def test_print_config_is_returned():
    assert parse(["--method", "dino"])[1] is False
    assert parse(["--method", "dino", "--print-config"])[1] is True


def test_help_needs_no_method(capsys):
    """It once asked for --method."""
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    assert "usage: fasttrain train" in capsys.readouterr().out
