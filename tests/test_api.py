"""A run from Python is the command's, and its result can be used."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

import fasttrain
from fasttrain.cli import main
from fasttrain.errors import ConfigError
from fasttrain.evaluate.knn import knn_accuracy
from fasttrain.pipelines import ArraySource, DataError, Loader, Splits, evaluation_view
from tests.small_runs import SMALL, assert_same_run, flags

_SHORT = {k: v for k, v in SMALL.items() if k != "recipe"} | {"limit_steps": 2, "knn_every": 0, "num_workers": 1}


def _arrays(count, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return ArraySource(generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), labels, ("a", "b"), name="mine")


@pytest.fixture(scope="module")
def result(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("api") / "run"
    return fasttrain.train("simclr", entropy=True, data=images, recipe="cifar", output_dir=str(output), **_SHORT)


def test_it_is_the_same_run_as_the_commands(result, images, tmp_path):
    more = ("--entropy", "--limit_steps", 2, "--knn_every", 0, "--num_workers", 1)
    assert main(["train", *flags(images, tmp_path / "run", *more)]) == 0
    assert_same_run(result.output_dir, tmp_path / "run")


def test_the_network_is_the_one_that_was_evaluated(result):
    assert not result.network.training
    c = result.config

    def features(source):
        loader = Loader(source, evaluation_view(c.views, 32), 8, shuffle=False, drop_last=False, threads=1)
        batches = [(result.network(batch.views[0][0]), batch.labels) for batch in loader.epoch(0)]
        loader.close()
        return tuple(map(torch.cat, zip(*batches, strict=True)))

    top1 = knn_accuracy(*features(result.data.train), *features(result.data.val))
    assert top1 == pytest.approx(result.summary["knn_top1"])


def test_what_a_result_holds(result):
    assert [line["step"] for line in result.metrics] == [1, 2]
    assert result.metrics[-1]["information"] == pytest.approx(result.summary["information"])
    assert result.checkpoint == result.output_dir / "checkpoints" / "step-00000002"
    assert (result.config.method, result.config.entropy, result.config.train.limit_steps) == ("simclr", True, 2)
    assert repr(result).startswith("Result(simclr+ER, 2 steps in ")
    assert str(result.output_dir) in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.summary = {}


def test_a_configuration_file_is_overruled(result, tmp_path):
    file = result.output_dir / "config.yaml"
    again = fasttrain.train("simclr", config=file, limit_steps=1, output_dir=str(tmp_path / "again"))
    assert again.config.entropy
    assert again.summary["steps"] == 1
    assert again.config.train.lr == result.config.train.lr


def test_images_in_memory(tmp_path, capsys):
    result = fasttrain.train(
        "simclr", data=_arrays(16), val=_arrays(8, 1), recipe="cifar", output_dir=str(tmp_path / "run"), **_SHORT
    )
    assert result.summary["dataset"] == "mine"
    assert result.summary["knn_top1"] is not None
    page = result.report(tmp_path / "page.html").read_text()
    assert "<h2>Nearest neighbours</h2>" in page
    assert "Its images came from Python" in page
    capsys.readouterr()
    assert main(["report", str(result.output_dir)]) == 0  # which cannot have them, and takes no others for them
    assert "its data, mine, was in memory and has no path; from Python, Result.report()" in capsys.readouterr().err
    assert main(["eval", str(result.output_dir)]) == 2
    told = "fasttrain: the run's images were in memory and have no path; give some by --data_path\n"
    assert capsys.readouterr().err == told


def test_a_torch_data_set(tmp_path):
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    data = torch.utils.data.TensorDataset(pixels, torch.arange(16) % 4)
    result = fasttrain.train("simclr", data=data, recipe="cifar", output_dir=str(tmp_path / "run"), **_SHORT)
    assert result.data.train.labels.tolist() == [0, 1, 2, 3] * 4


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "dinno"}, ConfigError, "method 'dinno' is unknown"),
        ({"lrr": 0.1}, ConfigError, "setting 'lrr' is unknown; did you mean lr"),
        ({"epochs": 0}, ConfigError, "--epochs must be at least 1, got 0"),
        ({"data": "/no/such"}, DataError, "no such folder"),
        ({"data": ""}, DataError, "the data path is empty"),
        ({"data": 5}, ConfigError, "data is int; give a path, a map-style data set or a source"),
        ({"config": "/no/such.yaml"}, ConfigError, "--config /no/such.yaml cannot be read"),
        ({"data": "/some", "val": _arrays(4)}, ConfigError, "give both as paths or both as data sets"),
        ({"data": _arrays(4), "val": "/some"}, ConfigError, "val must be a data set too"),
        ({"data": Splits("s", _arrays(4), None), "val": _arrays(4)}, ConfigError, "leave val out"),
    ],
)
def test_what_cannot_be_run(given, error, message, tmp_path):
    with pytest.raises(error, match=message):
        fasttrain.train(**{"method": "simclr", "output_dir": str(tmp_path / "run"), **given})


def test_without_the_trainers_libraries_the_error_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "fasttrain.training.trainer", None)
    with pytest.raises(
        ImportError, match=r"the trainer needs fasttrain\.trainer; type: pip install 'fasttrain\[train\]'"
    ):
        fasttrain.train("dino")
