"""Images that are not 8-bit RGB, from training to export, and the pixel format that a run stores."""

import json

import numpy as np
import pytest
import yaml

import fasttrain
from fasttrain.cli import main
from fasttrain.config.resolve import resolve
from fasttrain.errors import ConfigError, DataError
from fasttrain.models.weights import read_metadata
from fasttrain.pipelines import ArraySource
from fasttrain.pretrained import from_file
from fasttrain.training.pixels import settled
from tests.pipelines.sources.test_decode import npy, tiff
from tests.pipelines.test_loader_of_unusual_files import png_of_16_bits
from tests.small_runs import assert_same_run, flags

FILES = {"tif": lambda x: tiff(x, planarconfig="contig"), "npy": npy, "png": png_of_16_bits}


pytestmark = pytest.mark.usefixtures("one_thread")


def write(root, suffix, channels):
    """Write images of 12 bits in uint16, whose classes differ in brightness, in train/ and val/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for i in range(count):
            values = rng.integers(0, 4096 >> i % 2, (36, 32, channels)).astype(np.uint16)
            file = root / split / "ab"[i % 2] / f"{i:02}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(FILES[suffix](values))
    return root


_SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("npy", 4), ("png", 1))]


@pytest.mark.parametrize(("suffix", "channels"), [("tif", 13), *_SLOW])
def test_deep_images_train_resume_evaluate_and_export(tmp_path, suffix, channels):
    data = write(tmp_path / "data", suffix, channels)
    common = ("--num_workers", 1, "--saveckp_freq_steps", 1, "--global_crops_size", 32, 24)
    assert main(["train", *flags(data, tmp_path / "whole", *common)]) == 0
    assert main(["train", *flags(data, tmp_path / "halves", *common, "--limit_steps", 1)]) == 0
    assert main(["train", *flags(data, tmp_path / "halves", *common)]) == 0
    assert_same_run(tmp_path / "halves", tmp_path / "whole")
    stored = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    expected = {1: 3}.get(channels, channels)  # a grey image is repeated
    assert (stored["channels"], len(stored["mean"])) == (expected, expected)
    assert stored["pixel_range"][1::2] == pytest.approx([4095] * (1 if channels == 1 else channels), abs=25)

    export, figures = tmp_path / "x.safetensors", tmp_path / "figures.json"
    assert main(["export", str(tmp_path / "whole"), "--format", "safetensors", "--output", str(export)]) == 0
    written = read_metadata(export)
    assert {name: written[name] for name in ("channels", "mean", "std", "pixel_range")} == {
        name: stored[name] for name in ("channels", "mean", "std", "pixel_range")
    }
    assert (from_file(export).blueprint.size, written["encoders"]) == ((32, 24), [expected])
    options = ["--metrics", "knn", "--cache", "none", "--num_workers", "1", "--output", str(figures)]
    assert main(["eval", str(export), "--data_path", str(data), *options]) == 0
    assert json.loads(figures.read_text())["knn"]["10"]["top1"] == 1.0
    assert main(["report", str(tmp_path / "whole")]) == 0


def test_python_data_set_of_many_channels_trains(tmp_path):
    values = np.random.default_rng(0).random((16, 20, 20, 5)).astype(np.float32)
    small = {"recipe": "cifar", "arch": "conv_small", "batch_size_per_gpu": 8, "epochs": 1, "limit_steps": 1}
    small |= {"global_crops_size": 16, "num_workers": 1, "out_dim": 8, "hidden_dim": 8}
    result = fasttrain.train("simclr", data=ArraySource(values), output_dir=tmp_path, **small)
    assert result.config.views.channels == 5
    assert result.config.views.pixel_range[1::2] == pytest.approx([1] * 5, abs=0.01)
    assert next(result.network.parameters()).shape[1] == 5


def source(high, channels=1):
    return ArraySource(np.arange(high, dtype=np.uint16).repeat(64).reshape(-1, 8, 8, 1).repeat(channels, -1))


def test_stored_range_is_used_for_other_images(tmp_path):
    first, lines = settled(resolve("simclr", {"data_path": "-"}), source(100))
    assert first.views.pixel_range[1] < 100
    assert lines
    (tmp_path / "config.yaml").write_text(first.to_yaml())
    again, _ = settled(resolve("simclr", {"data_path": "-"}), source(1000), resumed=tmp_path)
    assert again.views == first.views
    stated = resolve("simclr", {"data_path": "-", "pixel_range": (0.0, 5.0)})
    assert settled(stated, source(1000), resumed=tmp_path)[0].views.pixel_range == (0.0, 5.0)
    assert settled(resolve("simclr", {}, yaml.safe_load(first.to_yaml())), source(1000))[0].views == first.views


def test_resumed_run_keeps_its_number_of_channels(tmp_path):
    """Before 4 channels could be trained, the fourth of an array was dropped."""
    old = resolve("simclr", {"data_path": "-"})
    (tmp_path / "config.yaml").write_text(old.to_yaml())
    images = ArraySource(np.zeros((4, 8, 8, 4), np.uint8))
    assert settled(old, images, resumed=tmp_path)[0].views == old.views
    assert settled(old, images)[0].views.channels == 4


@pytest.mark.parametrize(
    ("values", "error", "name"),
    [
        ({"channels": 4}, DataError, "2 channels, not 4"),
        ({"mean": [0.1, 0.2, 0.3]}, ConfigError, "--mean: "),
        ({"pixel_range": [0.0, 1.0] * 3}, DataError, "2 channels, not 3"),
    ],
)
def test_settings_that_do_not_fit_the_images_are_named(values, error, name):
    with pytest.raises(error, match=name):
        settled(resolve("simclr", {"data_path": "-", **values}), source(10, 2))
