"""The loader's promises on sources of every kind: exact restarts, ranks that share a batch, labels, bad images."""

import logging
import os

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fasttrain.pipelines import ArraySource, Loader, View, ViewRecipe, open_source, source_from_dataset

from .sources.shard_files import encode, imagenet_records, jpeg, picture, samples, write_tar, write_tfrecord

COUNT, BATCH = 18, 4
RECIPE = ViewRecipe((View(12, 2, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2), View(8, 1, scale=(0.1, 0.4), local=True)))


class Pairs(Dataset):
    def __init__(self, make):
        self.make, self.targets = make, [k % 3 for k in range(COUNT)]

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return self.make(i), self.targets[i]


def pixels(k):
    """Pictures of many sizes."""
    return np.array(picture(k, (20 + k, 30 - k)))


def folder(path):
    for k in range(COUNT):
        file = path / f"images/{k % 3}/{k:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(k))
    return open_source(str(path / "images")).train


def tars(path):
    for first, last in ((0, 5), (5, 6), (6, 18)):
        write_tar(path / f"tars/{first:03}.tar", samples(range(first, last)))
    return open_source(str(path / "tars/*.tar")).train


def tfrecords(path):
    for first, last in ((0, 5), (5, 18)):
        write_tfrecord(path / f"records/train-{first:05}-of-00018", imagenet_records(range(first, last)))
    return open_source(str(path / "records")).train


def array(path):
    images = np.stack([np.array(picture(k)) for k in range(COUNT)])
    return ArraySource(images, np.arange(COUNT) % 3)


def dataset_of_files(path):
    return source_from_dataset(Pairs(lambda k: encode(picture(k, (20 + k, 24)), "PNG")))


def dataset_of_pictures(path):
    return source_from_dataset(Pairs(lambda k: picture(k, (20 + k, 24)).convert("L" if k % 4 else "RGB")))


def dataset_of_arrays(path):
    return source_from_dataset(Pairs(pixels))


def dataset_of_tensors(path):
    return source_from_dataset(Pairs(lambda k: torch.from_numpy(pixels(k)).permute(2, 0, 1)))


SHARDS = [tars, tfrecords]
KINDS = [folder, *SHARDS, array, dataset_of_files, dataset_of_pictures, dataset_of_arrays, dataset_of_tensors]


def batches(source, epoch, start=0, **options):
    loader = Loader(source, RECIPE, options.pop("batch", BATCH), **options)
    found = list(loader.epoch(epoch, start))
    loader.close()
    return found


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_is_exact_and_ranks_share_the_batch(tmp_path, kind):
    source = kind(tmp_path)
    assert len(source) == COUNT
    straight = batches(source, 1)
    assert len(straight) == 4
    for start in range(4):
        assert_same(batches(kind(tmp_path), 1, start, threads=1 + start), straight[start:])
    for start in (0, 3):
        ranks = [batches(kind(tmp_path), 1, start, batch=BATCH // 2, rank=r, world_size=2) for r in range(2)]
        for whole, *parts in zip(straight[start:], *ranks, strict=True):
            for k, view in enumerate(whole.views):
                assert torch.equal(torch.cat([part.views[k] for part in parts], 1), view)
            assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
            assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_differ_and_labels_belong_to_the_images(tmp_path, kind):
    source = kind(tmp_path)
    runs = [batches(source, epoch, seed=seed) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    orders = [torch.cat([batch.indices for batch in run]).tolist() for run in runs]
    assert len({tuple(order) for order in orders}) == 3
    assert all(len(set(order)) == 16 for order in orders)
    views = [{int(i): batch.views[0][:, k] for batch in run for k, i in enumerate(batch.indices)} for run in runs]
    for i in set(views[0]) & set(views[1]) & set(views[2]):
        assert not torch.equal(views[0][i], views[1][i])
        assert not torch.equal(views[0][i], views[2][i])
    for batch in (batch for run in runs for batch in run):
        assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()


@pytest.mark.parametrize("kind", SHARDS)
def test_shards_have_the_folders_images(tmp_path, kind):
    """The same files in another packing give the same batches, image for image."""
    shards, files = kind(tmp_path), folder(tmp_path)
    place = {int(files.paths[i][-7:-4]): i for i in range(COUNT)}
    for k in range(COUNT):
        assert shards.read(k).tobytes() == files.read(place[k]).tobytes() == jpeg(k)
        assert shards.labels[k] == files.labels[place[k]] == k % 3


@pytest.mark.parametrize("kind", SHARDS)
def test_a_bad_image_in_a_shard_is_named_once_and_replaced(tmp_path, kind, caplog):
    caplog.set_level(logging.WARNING, "fasttrain.data")
    source = kind(tmp_path)
    bad = 7
    path = source.describe(bad).partition(": ")[0]
    with open(path, "r+b") as file:
        file.seek(int(source.offsets[bad]))
        file.write(b"no image" * 4)
    loader = Loader(source, RECIPE, 6)
    seen = [[int(i) for batch in loader.epoch(epoch) for i in batch.indices] for epoch in range(2)]
    loader.close()
    assert [sorted(set(range(COUNT)) - set(epoch)) for epoch in seen] == [[bad], [bad]]
    assert all(len(epoch) == COUNT for epoch in seen)
    name = {tars: "0007.jpg", tfrecords: "record 2"}[kind]
    line = f"{path}: {name} at byte {source.offsets[bad]}: not an image; left out from now on"
    assert [record.getMessage() for record in caplog.records] == [line]


@pytest.mark.parametrize("kind", SHARDS)
@pytest.mark.parametrize("lost", ["cut", "gone"])
def test_a_shard_that_is_lost_on_the_way(tmp_path, kind, lost):
    source = kind(tmp_path)
    last = source.describe(COUNT - 1).partition(": ")[0]
    kept = [i for i in range(COUNT) if not source.describe(i).startswith(last)]
    os.truncate(last, 0) if lost == "cut" else os.remove(last)
    loader = Loader(source, RECIPE, 6)
    seen = {int(i) for batch in loader.epoch(0) for i in batch.indices}
    loader.close()
    assert seen == set(kept)
    reason = {"cut": "the shard has become shorter", "gone": "No such file or directory"}[lost]
    assert set(loader.bad.values()) == {reason}
    assert len(loader.bad) == COUNT - len(kept)
