"""Cached features are reused for the same weights, images and view only."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain import pipelines
from fasttrain.distributed.world import World
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


def _cache(network, folder):
    return FeatureCache(network, torch.device("cpu"), World(0, 1, 0, 1), folder, batch=4, threads=1)


def _extracted(network, source, folder, recipe=_CLEAN, seed=0):
    """Evaluate with a new cache; return the number of images that it extracts."""
    cache = _cache(network, folder)
    cache.views(source, recipe, seed)
    return cache.extracted


def test_cache_second_evaluation_reads_the_same_features(source, network, tmp_path):
    first, second = _cache(network, tmp_path), _cache(network, tmp_path)
    extracted, cached = (cache.views(source, _RANDOM, 1) for cache in (first, second))
    assert (first.extracted, first.reused, second.extracted, second.reused) == (11, 0, 0, 11)
    assert extracted.features.shape == (11, 3, 128)
    assert torch.equal(extracted.features, cached.features)
    assert cached.labels.tolist() == extracted.labels.tolist() == [k % 3 for k in range(11)]


def test_cache_without_folder_always_extracts(source, network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [_extracted(network, source, None) for _ in range(2)] == [11, 11]
    assert list(tmp_path.iterdir()) == []


def test_cache_key_has_view_seed_weights_labels_and_pixels(source, network, tmp_path):
    assert _extracted(network, source, tmp_path) == 11
    assert _extracted(network, source, tmp_path, seed=5) == 0  # a clean view has no seed
    assert _extracted(network, source, tmp_path, _RANDOM) == 11
    assert _extracted(network, source, tmp_path, _RANDOM, seed=5) == 11
    with torch.no_grad():
        network.layers[0].bn.running_mean[3] += 1e-6
    assert _extracted(network, source, tmp_path) == 11
    assert _extracted(network, ArraySource(source.images, (source.labels + 1) % 3), tmp_path) == 11
    images = source.images.copy()
    images[7, 0, 0] ^= 1
    assert _extracted(network, ArraySource(images, source.labels), tmp_path) == 11
    assert _extracted(network, source, tmp_path) == 0


def test_cache_replaces_a_cut_file_and_works_without_a_folder(source, network, tmp_path, capsys):
    """An unwritable cache ended an evaluation after all the work."""
    _extracted(network, source, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert [_extracted(network, source, tmp_path) for _ in range(2)] == [11, 0]
    assert _extracted(network, source, file / "cache") == 11
    assert f"--cache {file}/cache: cannot be written" in capsys.readouterr().out


def test_source_digest_changes_with_date_and_name(tmp_path):
    root = write_images(tmp_path, train=40, val=0) / "train"
    before, path = source_digest(FolderSource(root)), FolderSource(root).paths[1]
    assert source_digest(FolderSource(root)) == before
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    dated = source_digest(FolderSource(root))
    os.rename(path, path.replace("cat", "dog").replace(".", "-moved."))
    assert len({before, dated, source_digest(FolderSource(root))}) == 3


def test_source_digest_differs_between_subsets(source):
    few = Subset(source, [0, 3, 6])
    assert (len(few), few.labels.tolist(), few.describe(2)) == (3, [0, 0, 0], "array 6")
    assert np.array_equal(few.read(2), source.images[6])
    assert source_digest(few) != source_digest(Subset(source, [0, 3, 7]))


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_source_digest_changes_with_one_byte_of_a_shard(kind, tmp_path, monkeypatch):
    path = tmp_path / f"a.{kind}"
    records = [example(image=jpeg(k), label=k % 3) for k in range(40)]
    write_tar(path, samples(range(40))) if kind == "tar" else write_tfrecord(path, records)
    before = source_digest(open_source(str(path)).train)
    assert source_digest(open_source(str(path)).train) == before
    monkeypatch.setattr(ShardSource, "describe", None)  # names are slow: reading one reads all records before it
    source = open_source(str(path)).train
    content = bytearray(path.read_bytes())
    content[int(source.offsets[1]) + 40] ^= 1  # in a record whose content is not hashed
    path.write_bytes(content)
    assert source_digest(source) != before


def test_network_digest_has_structure_and_plain_attributes():
    layers = [nn.Linear(2, 2), nn.ReLU()]
    one, other = nn.Sequential(*layers), nn.Sequential(layers[0], nn.GELU())
    assert network_digest(one) == network_digest(nn.Sequential(*layers)) != network_digest(other)
    vits = [create_backbone("vit_tiny", img_size=32, num_heads=heads) for heads in (3, 6)]
    vits[1].load_state_dict(vits[0].state_dict())
    assert str(vits[0]) == str(vits[1])
    assert network_digest(vits[0]) != network_digest(vits[1])


def test_views_digest_changes_with_the_code(tmp_path, monkeypatch):
    digests = []
    copy = shutil.copytree(Path(pipelines.__file__).parent, tmp_path / "pipelines")
    for change in (None, "", "# other pixels\n"):
        if change is not None:
            monkeypatch.setattr(pipelines, "__file__", str(copy / "__init__.py"))
            (copy / "loader.py").write_text((copy / "loader.py").read_text() + change)
        views_digest.cache_clear()
        digests.append(views_digest())
    views_digest.cache_clear()
    assert digests[0] == digests[1] != digests[2]


def test_default_folder_is_in_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fasttrain" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder().parts[-3:] == (".cache", "fasttrain", "features")
