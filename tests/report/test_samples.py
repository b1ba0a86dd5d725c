"""What a report shows of images is what the network makes of them."""

import dataclasses

import numpy as np
import pytest
import torch

from fasttrain.errors import ConfigError
from fasttrain.pipelines import ArraySource, DataError, Splits
from fasttrain.report.runs import read_run
from fasttrain.report.samples import look
from tests.small_runs import train_few_steps, write_images


@pytest.fixture(scope="module")
def run(dino_run):
    return read_run(dino_run, "dino")


def test_rows_are_the_networks_features_of_the_inputs(run):
    sample = look(run, 5)
    assert len(sample.source) == 5
    assert sample.held_out
    inputs = sample.inputs(range(5))
    features = torch.nn.functional.normalize(sample.backbone.network(inputs), dim=1)
    torch.testing.assert_close(sample.rows, features)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (sample.backbone.blueprint.pixels.mean, sample.backbone.blueprint.pixels.std)
    )
    shown = np.asarray(sample.pictures([3])[0]).transpose(2, 0, 1)
    assert np.abs(shown - 255 * (inputs[3] * std + mean).clamp(0, 1).numpy()).max() <= 1


def test_names_and_classes_are_those_of_the_images(run):
    sample = look(run, 8)
    for i, label in enumerate(sample.labels):
        assert sample.describe(i).endswith(f", class {('cat', 'dog')[label]}")
        assert ("cat", "dog")[label] in sample.source.describe(i)


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    data = write_images(tmp_path / "noise", val=6)
    output = train_few_steps(data, tmp_path / "run")
    broken = data / "val" / "dog" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:40])
    sample = look(read_run(output, "it"), 100)
    assert len(sample.source) == len(sample.rows) == len(sample.labels) == 5
    assert not any(str(broken) in sample.source.describe(i) for i in range(5))
    features = sample.backbone.network(sample.inputs(range(5)))
    torch.testing.assert_close(sample.rows, torch.nn.functional.normalize(features, dim=1))


def test_other_data_than_the_runs_is_not_shown(run):
    summary = run.summary | {"dataset": "Mine"}
    with pytest.raises(DataError, match="its data, Mine, is not what its path has now, noise"):
        look(dataclasses.replace(run, summary=summary), 4)
    train = ArraySource(np.zeros((4, 32, 32, 3), np.uint8), name="Mine")
    assert look(dataclasses.replace(run, summary=summary), 4, Splits("Mine", train, None)).labels is None
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        look(dataclasses.replace(run, config=None), 4)
