"""A run from Python equals the command's, and its result is usable."""

import dataclasses
import inspect
import re
import sys
import typing

import numpy as np
import pytest
import torch

import fasttrain
from fasttrain.cli import main
from fasttrain.config.settings import PixelFlags, TrainConfig, ViewFlags
from fasttrain.errors import ConfigError
from fasttrain.evaluate.knn import knn_accuracy
from fasttrain.pipelines import ArraySource, DataError, Loader, Splits, evaluation_view
from tests.small_runs import SMALL, assert_same_run, flags

_SHORT = {k: v for k, v in SMALL.items() if k != "recipe"} | {"limit_steps": 2, "num_workers": 1}


def _arrays(count, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return ArraySource(generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), labels, ("a", "b"), name="mine")


@pytest.fixture(scope="module")
def result(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("api") / "run"
    return fasttrain.train("simclr", entropy=True, data=images, recipe="cifar", output_dir=str(output), **_SHORT)


def test_train_makes_the_same_run_as_the_command(result, images, tmp_path):
    more = ("--entropy", "--limit_steps", 2, "--num_workers", 1)
    assert main(["train", *flags(images, tmp_path / "run", *more)]) == 0
    assert_same_run(result.output_dir, tmp_path / "run")


def test_result_network_is_the_evaluated_one(result):
    assert not result.network.training
    c = result.config

    def features(source):
        loader = Loader(source, evaluation_view(c.views, 32), 8, shuffle=False, drop_last=False, threads=1)
        batches = [(result.network(batch.views[0][0]), batch.labels) for batch in loader.epoch(0)]
        loader.close()
        return tuple(map(torch.cat, zip(*batches, strict=True)))

    top1 = knn_accuracy(*features(result.data.train), *features(result.data.val))
    assert top1 == pytest.approx(result.summary["knn_top1"])


def test_result_holds_metrics_config_and_checkpoint(result):
    assert [line["step"] for line in result.metrics] == [1, 2]
    assert result.metrics[-1]["information"] == pytest.approx(result.summary["information"])
    assert result.checkpoint == result.output_dir / "checkpoints" / "step-00000002"
    assert (result.config.method, result.config.entropy, result.config.train.limit_steps) == ("simclr", True, 2)
    assert repr(result).startswith("Result(simclr+ER, 2 steps in ")
    assert str(result.output_dir) in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.summary = {}


def test_arguments_override_a_configuration_file(result, tmp_path):
    file = result.output_dir / "config.yaml"
    again = fasttrain.train("simclr", config=file, limit_steps=1, output_dir=str(tmp_path / "again"))
    assert again.config.entropy
    assert again.summary["steps"] == 1
    assert again.config.train.lr == result.config.train.lr


def test_images_in_memory_train_and_report(tmp_path, capsys):
    result = fasttrain.train(
        "simclr", data=_arrays(16), val=_arrays(8, 1), recipe="cifar", output_dir=str(tmp_path / "run"), **_SHORT
    )
    assert result.summary["dataset"] == "mine"
    assert result.summary["knn_top1"] is not None
    page = result.report(tmp_path / "page.html").read_text()
    assert "<h2>Nearest neighbours</h2>" in page
    assert "Its images came from Python" in page
    capsys.readouterr()
    assert main(["report", str(result.output_dir)]) == 0  # it cannot have the images, and opens no others
    assert "Result.report()" in capsys.readouterr().err
    assert main(["eval", str(result.output_dir)]) == 2
    assert "--data_path" in capsys.readouterr().err


def test_torch_data_set_is_trained_on(tmp_path):
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    data = torch.utils.data.TensorDataset(pixels, torch.arange(16) % 4)
    result = fasttrain.train("simclr", data=data, recipe="cifar", output_dir=str(tmp_path / "run"), **_SHORT)
    assert result.data.train.labels.tolist() == [0, 1, 2, 3] * 4


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"method": "dinno"}, ConfigError, "--method.*'dinno'"),
        ({"lrr": 0.1}, ConfigError, "'lrr'.*lr"),
        ({"epochs": 0}, ConfigError, "--epochs.*0"),
        ({"data": "/no/such"}, DataError, "/no/such"),
        ({"data": ""}, ConfigError, "empty"),
        ({"data": 5}, ConfigError, "data: .*int"),
        ({"config": "/no/such.yaml"}, ConfigError, "--config /no/such.yaml"),
        ({"plugin": "/no/such.py"}, ConfigError, "--plugin.*/no/such.py"),
        ({"data": "/some", "val": _arrays(4)}, ConfigError, "val: "),
        ({"data": _arrays(4), "val": "/some"}, ConfigError, "val: .*'/some'"),
        ({"data": Splits("s", _arrays(4), None), "val": _arrays(4)}, ConfigError, "val: "),
    ],
)
def test_invalid_argument_is_refused_by_name(arguments, error, names, tmp_path):
    with pytest.raises(error, match=names):
        fasttrain.train(**{"method": "simclr", "output_dir": str(tmp_path / "run"), **arguments})


def test_signature_has_every_setting_with_its_type():
    """An IDE completes and checks the settings: the signature must not fall behind the settings classes."""
    parameters = inspect.signature(fasttrain.train).parameters
    hints = typing.get_type_hints(TrainConfig) | typing.get_type_hints(ViewFlags) | typing.get_type_hints(PixelFlags)
    others = {"method", "entropy", "data", "val", "model", "config", "plugin", "recipe", "method_settings"}
    assert set(parameters) == set(hints) | others
    widened = dict.fromkeys(("lr_drops", "pixel_range", "data_weights"), "Sequence[float]")
    widened |= dict.fromkeys(("global_crops_size", "local_crops_size"), "int | tuple[int, int]")
    widened |= dict.fromkeys(("data_path", "val_path", "output_dir", "init_from", "reference_path"))
    for name, hint in hints.items():
        annotation = parameters[name].annotation
        expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("'", '"')
        optional = re.fullmatch(r"Optional\[(.*)\]|(.*) \| None", expected)
        base = widened.get(name, (optional[1] or optional[2]) if optional else expected)
        if base is not None and "Literal" not in expected:
            assert annotation == f"{base} | None", name
        assert parameters[name].default is None


def test_missing_package_is_named_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fasttrain.training.trainer", None)
    with pytest.raises(ImportError, match=r"pip install 'fasttrain\[train\]'"):
        fasttrain.train("dino")
