"""Every command with data of several paths and of Hugging Face. The run's stored paths open the same data again."""

import json

import pytest
import yaml
from datasets import DatasetDict

import fasttrain
from fasttrain.cli import main
from fasttrain.config.arguments import parse
from fasttrain.errors import ConfigError
from fasttrain.pipelines import open_source
from tests.pipelines.sources.shard_files import samples, write_tar
from tests.pipelines.sources.test_hugging_face import labelled
from tests.small_runs import SMALL, assert_same_run, flags

pytestmark = pytest.mark.usefixtures("one_thread")
_SHORT = ("--num_workers", 1, "--limit_steps", 6, "--knn_every", 1)


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    """A folder with the data sets, and the flags for each kind of data."""
    root = tmp_path_factory.mktemp("data")
    DatasetDict(train=labelled(32), test=labelled(8, 32)).save_to_disk(str(root / "animals"))
    write_tar(root / "tars/a.tar", samples(range(8)))
    (root / "noise").symlink_to(images)
    kinds = {"hf": ("hf:animals",), "mixed": ("noise", "tars", "hf:animals", "--data_weights", 2, 1, 0.5)}
    return root, kinds


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "mixed"])
def test_commands_take_the_data(data, tmp_path, kind, capsys, monkeypatch):
    """Training is bit-identical after a stop in the middle of an epoch."""
    root, kinds = data
    monkeypatch.chdir(root)

    def train(output, *more):
        return main(["train", *flags("unused", tmp_path / output, *_SHORT, "--data_path", *kinds[kind], *more)])

    assert train("straight") == 0
    shares = [
        "noise: 32 images, 41 in an epoch",
        "tars: 8 images, 21 in an epoch",
        "animals: 32 images, 10 in an epoch",
    ]
    printed = capsys.readouterr().out
    assert [share for share in shares if share in printed] == (shares if kind == "mixed" else [])
    assert train("stopped", "--limit_steps", 3) == 0
    assert train("stopped") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    monkeypatch.chdir(tmp_path)  # the run has absolute paths
    assert main(["eval", "straight", "--cache", "none", "--metrics", "knn", "--output", "figures.json"]) == 0
    summary = json.loads((tmp_path / "straight/summary.json").read_text())
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["dataset"], figures["images"]) == (summary["dataset"], summary["images"])
    assert summary["images"] == {"hf": 32, "mixed": 72}[kind]
    assert main(["export", "straight", "--format", "safetensors", "--output", "out.safetensors"]) == 0
    assert main(["report", "straight", "--images", "4", "--output", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Nearest neighbours</h2>" in page
    assert all(str(root / path) in page for path in ("animals", *(["noise"] if kind == "mixed" else [])))
    config = ["--config", str(tmp_path / "straight/config.yaml")]
    assert main(["views", *config, "--images", "3", "--output", "views.png"]) == 0
    assert main(["plan", *config, "--images", "1000"]) == 0
    capsys.readouterr()


def test_network_may_follow_several_data_paths(simclr_run, images, capsys):
    more = ["--cache", "none", "--metrics", "knn"]
    assert main(["eval", *more, "--data_path", str(images), str(images), str(simclr_run)]) == 0
    assert f"{images.name} + {images.name}, 32 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--data_weights", "1", "2"], "--data_weights"),
        (["--data_path", "a", "b", "--data_weights", "1"], "--data_weights"),
        (["--data_path", "a", "b", "--data_weights", "1", "0"], "--data_weights"),
        (["--data_path", "a", "b", "--data_weights", "1", "-3"], "--data_weights"),
        (["--data_path", "a", "b", "--data_weights", "nan", "1"], "--data_weights"),
        (["--data_path", "a", "b", "--data_weights", "many", "1"], "--data_weights"),
    ],
)
def test_invalid_weights_are_one_line(arguments, flag):
    with pytest.raises(ConfigError, match=flag) as raised:
        parse(["--method", "simclr", *arguments])
    assert "\n" not in str(raised.value)


def test_paths_are_lists_in_yaml_and_absolute_in_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    file.write_text("method: simclr\ndata_path: [a, hf:b]\nval_path: [c]\ndata_weights: [3, 1]\n")
    config = parse(["--config", str(file)])[0]
    assert (config.train.data_path, config.train.val_path, config.train.data_weights) == (("a", "hf:b"), "c", (3, 1))
    stored = yaml.safe_load(config.with_absolute_paths().to_yaml())
    assert stored["data_path"] == [str(tmp_path / "a"), f"hf:{tmp_path}/b"]
    file.write_text(yaml.safe_dump(stored))
    assert parse(["--config", str(file)])[0] == config.with_absolute_paths()
    assert parse(["--config", str(file), "--data_path", "one", "--data_weights"])[0].train.data_path == "one"


def test_python_takes_lists_of_anything(data, tmp_path):
    root, _ = data
    short = {name: value for name, value in SMALL.items() if name != "recipe"}
    short |= {"limit_steps": 2, "knn_every": 1, "num_workers": 1, "recipe": "cifar"}
    animals = {"train": labelled(16), "test": labelled(8, 16)}
    parts = [str(root / "noise"), open_source(str(root / "tars")).train, DatasetDict(animals)]
    result = fasttrain.train("simclr", data=parts, data_weights=[1, 1, 2], output_dir=tmp_path / "a", **short)
    assert result.data.train.quotas == [14, 14, 28]
    assert result.data.train.classes == ("cat", "dog", "0", "1", "2")
    assert (len(result.data.val), result.summary["dataset"]) == (16, "noise + tars + train")
    assert result.summary["knn_top1"] is not None
    paths = [root / "noise", root / "tars"]
    result = fasttrain.train("simclr", data_path=paths, output_dir=tmp_path / "b", **short)
    assert result.config.train.data_path == tuple(map(str, paths))
