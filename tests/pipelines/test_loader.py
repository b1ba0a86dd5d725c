"""Which images, in which order, on which rank; exact restarts; reading ahead; what cannot be asked for."""

import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.pipelines import ArraySource, DataError, FolderSource, Loader, View, ViewRecipe, evaluation_view

from .loading import COLOR, GREY, RAW, same, seen

INFOMIN = ViewRecipe(
    (
        View(16, 2, jitter=(0.8, 0.8, 0.8, 0.2), blur=0.5, rand_augment=2),
        View(8, 4, scale=(0.6, 1.0), local=True, jigsaw=2),
    ),
    color_space="lab",
)


def arrays(count=20, channels=1, labels=True):
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 14, channels), dtype=np.uint8)
    return ArraySource(images, np.arange(count) % 3 if labels else None, "abc", "thing")


def test_shapes_types_and_memory(open_loader, folder):
    loader = open_loader(FolderSource(folder), COLOR, 4)
    batch = next(loader.epoch(0))
    assert [tuple(v.shape) for v in batch.views] == [(2, 4, 3, 16, 16), (3, 4, 3, 8, 8)]
    for view in batch.views:
        flat = view.flatten(0, 1)
        assert view.dtype == torch.float32
        assert flat.data_ptr() == view.data_ptr()
        assert flat.is_contiguous(memory_format=torch.channels_last)
    assert (batch.indices.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (loader.steps_per_epoch, len(list(loader.epoch(1)))) == (3, 3)


def test_labels_and_pixels_belong_to_the_indices(open_loader):
    source = arrays()
    recipe = evaluation_view(ViewRecipe((View(12),), 1, (0.0,), (1.0,)), 12)
    for batch in open_loader(source, recipe, 6).epoch(0):
        assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
        central = source.images[batch.indices.numpy(), :, 1:13, 0] / 255
        np.testing.assert_allclose(batch.views[0][0, :, 0].numpy(), central, atol=1e-3)


def test_unlabelled_data(open_loader):
    assert next(open_loader(arrays(labels=False), GREY, 4).epoch(0)).labels is None


def test_views_lie_in_different_places_and_ranges(open_loader):
    batch = next(open_loader(arrays(), GREY, 8).epoch(0))
    assert not torch.equal(batch.views[0][0], batch.views[0][1])
    assert batch.views[0].min() >= -0.1 / 0.3 - 1e-4
    assert batch.views[0].max() <= 0.9 / 0.3 + 1e-4


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch(open_loader, world_size):
    single = list(open_loader(arrays(), GREY, 8).epoch(3))
    ranks = [
        list(open_loader(arrays(), GREY, 8 // world_size, rank=r, world_size=world_size).epoch(3))
        for r in range(world_size)
    ]
    assert [len(rank) for rank in ranks] == [2] * world_size
    for step, whole in enumerate(single):
        joined = torch.cat([rank[step].views[0] for rank in ranks], 1)
        assert torch.equal(joined, whole.views[0])
        assert torch.equal(torch.cat([rank[step].labels for rank in ranks]), whole.labels)


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_restart_is_bit_identical(open_loader, start):
    loader = open_loader(arrays(), GREY, 4)
    straight = list(loader.epoch(1))
    again = list(open_loader(arrays(), GREY, 4, prefetch=3, threads=1).epoch(1, start_step=start))
    assert len(straight) == 5
    assert all(same(a, b) for a, b in zip(straight[start:], again, strict=True))


def test_large_views_are_the_same_after_a_restart_on_any_threads_and_ranks(open_loader, folder):
    """Views beyond the graph, with windows of every size, so that images meet others in a piece than before."""
    view = View(56, jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.8, solarize=0.3)
    recipe, source = ViewRecipe((view, View(80, 2, blur=0.5, local=True))), FolderSource(folder)
    straight = list(open_loader(source, recipe, 4, threads=1).epoch(3))
    assert len(straight) == 3
    for options in ({"threads": 3}, {"prefetch": 4, "threads": 2}, {}):
        again = open_loader(source, recipe, 4, **options).epoch(3, start_step=1)
        assert all(same(a, b) for a, b in zip(straight[1:], again, strict=True))
    ranks = [open_loader(source, recipe, 2, rank=rank, world_size=2).epoch(3) for rank in range(2)]
    for whole, *parts in zip(straight, *ranks, strict=True):
        for k, views in enumerate(whole.views):
            assert torch.equal(torch.cat([part.views[k] for part in parts], 1), views)


def test_batches_are_not_written_to_again(open_loader, folder):
    batches = open_loader(FolderSource(folder), COLOR, 2).epoch(0)
    first = next(batches)
    kept = [views.clone() for views in first.views]
    list(batches)
    assert all(torch.equal(a, b) for a, b in zip(first.views, kept, strict=True))


def test_an_abandoned_epoch_leaves_no_trace(open_loader, folder):
    loader = open_loader(FolderSource(folder), COLOR, 2)
    expected = list(loader.epoch(5))
    for _ in zip(range(2), loader.epoch(4), strict=False):
        pass
    half = loader.epoch(4)
    next(half)
    assert all(same(a, b) for a, b in zip(loader.epoch(5), expected, strict=True))
    assert list(half) == []


def test_every_image_once_an_epoch(open_loader):
    loader = open_loader(arrays(22), GREY, 5)
    indices = seen(loader.epoch(0))
    assert len(indices) == 20  # the last, incomplete batch is dropped
    assert len(set(indices)) == 20
    missed = [set(range(22)) - set(seen(loader.epoch(e))) for e in range(5)]
    assert len(set(map(frozenset, missed))) > 1  # and not always with the same images


def test_epochs_and_seeds_differ(open_loader):
    first, *others = [
        next(open_loader(arrays(), GREY, 10, seed=seed).epoch(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for other in others:
        assert first.indices.tolist() != other.indices.tolist()
        common = set(first.indices.tolist()) & set(other.indices.tolist())
        for i in common:
            a, b = (batch.views[0][:, batch.indices == i] for batch in (first, other))
            assert not torch.equal(a, b)


@pytest.mark.parametrize(("count", "world_size"), [(12, 1), (13, 1), (13, 2), (9, 2), (3, 4)])
def test_evaluation_sees_every_image_once_in_order(open_loader, count, world_size):
    options = {"shuffle": False, "drop_last": False, "world_size": world_size}
    recipe = evaluation_view(GREY, 8)
    loaders = [open_loader(arrays(count), recipe, 4, rank=r, **options) for r in range(world_size)]
    ranks = [list(loader.epoch(0)) for loader in loaders]
    steps = -(-count // (4 * world_size))
    assert [len(batches) for batches in ranks] == [steps] * world_size
    in_order = [i for step in range(steps) for batches in ranks for i in batches[step].indices.tolist()]
    assert in_order == list(range(count))
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.views[0].shape[:2] == (1, len(batch.indices))
        assert len(batch.labels) == len(batch.indices)


@pytest.mark.parametrize(("channels", "recipe"), [(1, RAW), (3, GREY), (1, GREY), (3, RAW)])
def test_arrays_convert_to_the_recipes_channels(open_loader, channels, recipe):
    source = arrays(4, channels)
    square = evaluation_view(ViewRecipe(recipe.views, recipe.channels, recipe.mean, recipe.std), 12)
    batch = next(open_loader(source, square, 4, shuffle=False).epoch(0))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (recipe.mean, recipe.std))
    ours = (batch.views[0][0] * std + mean)[:, :, :, 0] * 255
    for k, image in enumerate(source.images):
        mode = "L" if recipe.channels == 1 else "RGB"
        theirs = np.array(Image.fromarray(image.squeeze()).convert(mode), float).reshape(12, 14, -1)[:, 1]
        np.testing.assert_allclose(ours[k].T.numpy(), theirs, atol=1)


def test_batch_larger_than_the_data():
    message = r"thing: a batch of 24 images over 2 rank\(s\) is larger than the data, 20 images; use a smaller batch"
    with pytest.raises(DataError, match=message):
        Loader(arrays(), GREY, 12, world_size=2)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"threads": 0}, {"prefetch": 0}]
)
def test_impossible_numbers(options):
    with pytest.raises(DataError, match="use 1 or more of each, and a rank below the number of ranks"):
        Loader(arrays(), GREY, **{"batch_size": 2, **options})


def test_missing_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match="DALI is not installed"):
        Loader(arrays(), GREY, 4)


def test_reading_is_ahead_of_the_caller(open_loader):
    source, read = arrays(40), []
    inner = source.read
    source.read = lambda i: read.append(i) or inner(i)
    batches = open_loader(source, GREY, 2, prefetch=2, threads=2).epoch(0)
    next(batches)
    # One batch is out, two are being made and two are in the graph; the rest waits for its turn, of 40 images.
    assert 6 <= len(read) <= 2 * (1 + 2 + 2 + 2 + 2)


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    loader = Loader(arrays(), GREY, 4)
    next(loader.epoch(0))
    assert set(threading.enumerate()) > before
    loader.close()
    assert set(threading.enumerate()) == before


def test_branches_jigsaws_and_lab_are_the_same_on_any_split(open_loader, folder):
    source = FolderSource(folder)
    whole = [batch.views for batch in open_loader(source, INFOMIN, 6, drop_last=False).epoch(2)]
    assert [tuple(v.shape) for v in whole[0]] == [(2, 6, 3, 16, 16), (4, 6, 3, 8, 8)]
    loaders = [open_loader(source, INFOMIN, 3, rank=rank, world_size=2, drop_last=False) for rank in range(2)]
    for views, *parts in zip(whole, *(loader.epoch(2) for loader in loaders), strict=True):
        for k, view in enumerate(views):
            assert torch.equal(torch.cat([part.views[k] for part in parts], 1), view)
    again = open_loader(source, INFOMIN, 5, drop_last=False)  # the last batch is smaller
    assert [len(batch.indices) for batch in again.epoch(0)] == [5, 5, 2]
    assert [len(batch.indices) for batch in again.epoch(1)] == [5, 5, 2]
