"""Features are found again for the same weights, images and view, and for nothing else."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain import pipelines
from fasttrain.distributed.world import World
from fasttrain.errors import ConfigError
from fasttrain.evaluate.cache import FeatureCache, default_folder, network_digest, source_digest, views_digest
from fasttrain.models.architectures import ConvSmall, create_backbone
from fasttrain.pipelines import Subset, View, ViewRecipe, open_source
from fasttrain.pipelines.sources.base import ArraySource, FolderSource
from fasttrain.pipelines.sources.shards import ShardSource
from tests.pipelines.sources.shard_files import example, jpeg, samples, write_tar, write_tfrecord
from tests.small_runs import write_images

_CLEAN = ViewRecipe((View(size=8, scale=(1, 1), flip=0, center=True),), channels=1, mean=(0,), std=(1,))
_RANDOM = ViewRecipe((View(size=8, count=3),), channels=1, mean=(0,), std=(1,))


@pytest.fixture
def source():
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 1), np.uint8)
    return ArraySource(images, np.arange(11) % 3)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ConvSmall(1).eval()


def _cache(network, folder, **options):
    given = {"batch": 4, "threads": 1, **options}
    return FeatureCache(network, torch.device("cpu"), World(0, 1, 0, 1), folder, **given)


def _twice(network, source, folder, recipe=_CLEAN, seed=0):
    """How many images a second evaluation extracts."""
    cache = _cache(network, folder)
    cache.views(source, recipe, seed)
    return cache.extracted


def test_a_second_call_extracts_nothing_and_finds_the_same(source, network, tmp_path):
    first, second = _cache(network, tmp_path), _cache(network, tmp_path)
    made, found = (cache.views(source, _RANDOM, 1) for cache in (first, second))
    assert (first.extracted, first.found, second.extracted, second.found) == (11, 0, 0, 11)
    assert made.features.shape == (11, 3, 128)
    assert torch.equal(made.features, found.features)
    assert torch.equal(made.labels, found.labels)
    assert found.labels.tolist() == [k % 3 for k in range(11)]


def test_without_a_folder_everything_is_extracted(source, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [_twice(network, source, None) for _ in range(2)] == [11, 11]
    assert list(tmp_path.iterdir()) == []


def test_what_decides_the_features_decides_where_they_are(source, network, tmp_path):
    assert _twice(network, source, tmp_path) == 11
    assert _twice(network, source, tmp_path, seed=5) == 0  # a clean view has no seed
    assert _twice(network, source, tmp_path, _RANDOM) == 11
    assert _twice(network, source, tmp_path, _RANDOM, seed=5) == 11
    with torch.no_grad():
        network.layers[0].bn.running_mean[3] += 1e-6
    assert _twice(network, source, tmp_path) == 11
    assert _twice(network, ArraySource(source.images, (source.labels + 1) % 3), tmp_path) == 11
    images = source.images.copy()
    images[7, 0, 0] ^= 1
    assert _twice(network, ArraySource(images, source.labels), tmp_path) == 11
    assert _twice(network, source, tmp_path) == 0


def test_half_a_file_is_extracted_again(source, network, tmp_path):
    _twice(network, source, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert _twice(network, source, tmp_path) == 11
    assert _twice(network, source, tmp_path) == 0


def test_a_folder_that_cannot_be_written_is_an_error(source, network, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"features cannot be kept in .*file/cache: .*; choose --cache DIR"):
        _cache(network, tmp_path / "file" / "cache").views(source, _CLEAN)


def test_a_file_that_changes_changes_the_listing(tmp_path):
    root = write_images(tmp_path, train=40, val=0) / "train"
    before, path = source_digest(FolderSource(root)), FolderSource(root).paths[1]
    assert source_digest(FolderSource(root)) == before
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    dated = source_digest(FolderSource(root))
    assert dated != before
    os.rename(path, path.replace("cat", "dog").replace(".", "-moved."))
    assert source_digest(FolderSource(root)) not in (before, dated)


def test_a_subset_is_another_listing(source):
    few = Subset(source, [0, 3, 6])
    assert len(few) == 3
    assert few.labels.tolist() == [0, 0, 0]
    assert np.array_equal(few.read(2), source.images[6])
    assert few.describe(2) == "array 6"
    assert source_digest(few) != source_digest(Subset(source, [0, 3, 7]))


def test_a_network_of_the_same_weights_but_another_structure_is_another():
    layers = [nn.Linear(2, 2), nn.ReLU()]
    one, other = nn.Sequential(*layers), nn.Sequential(layers[0], nn.GELU())
    assert network_digest(one) == network_digest(nn.Sequential(*layers))
    assert network_digest(one) != network_digest(other)


def test_heads_are_part_of_a_network():
    vits = [create_backbone("vit_tiny", img_size=32, num_heads=heads) for heads in (3, 6)]
    vits[1].load_state_dict(vits[0].state_dict())
    assert str(vits[0]) == str(vits[1])
    assert network_digest(vits[0]) != network_digest(vits[1])


def test_other_code_for_the_views_makes_other_features(source, network, tmp_path, monkeypatch):
    assert [_twice(network, source, tmp_path, _RANDOM) for _ in range(2)] == [11, 0]
    views_digest.cache_clear()
    copy = shutil.copytree(Path(pipelines.__file__).parent, tmp_path / "pipelines")
    monkeypatch.setattr(pipelines, "__file__", str(copy / "__init__.py"))
    assert _twice(network, source, tmp_path, _RANDOM) == 0
    views_digest.cache_clear()
    with (copy / "crops.py").open("a") as file:
        file.write("# as if pixels were others\n")
    assert _twice(network, source, tmp_path, _RANDOM) == 11
    views_digest.cache_clear()


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_an_image_that_changes_in_a_shard_changes_the_listing(kind, tmp_path, monkeypatch):
    path = tmp_path / f"a.{kind}"
    records = [example(image=jpeg(k), label=k % 3) for k in range(40)]
    write_tar(path, samples(range(40))) if kind == "tar" else write_tfrecord(path, records)
    before = source_digest(open_source(str(path)).train)
    assert source_digest(open_source(str(path)).train) == before
    monkeypatch.setattr(ShardSource, "describe", None)  # a record's name is found by reading all before it
    source = open_source(str(path)).train
    at = int(source.offsets[1]) + 40  # not one of the few whose content is looked at
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert source_digest(source) != before


def test_the_folder_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fasttrain" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder().parts[-3:] == (".cache", "fasttrain", "features")
