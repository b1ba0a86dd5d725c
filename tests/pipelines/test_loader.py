"""Order, ranks, restarts and state of the loader's batches, for every kind of source."""

import io
import itertools
import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fasttrain.pipelines import (
    ArraySource,
    DataError,
    FolderSource,
    Loader,
    View,
    ViewRecipe,
    evaluation_view,
    open_source,
    source_from_dataset,
)

from .loading import COLOR, GREY, RAW, assert_same, seen
from .sources.shard_files import (
    encode,
    example,
    imagenet_records,
    picture,
    samples,
    write_folder,
    write_tar,
    write_tfrecord,
)

COUNT = 18
LARGE = ViewRecipe(  # made outside of the graph; the blur windows differ, so images are grouped differently
    (View(56, jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.8, solarize=0.3), View(80, 2, blur=0.5, local=True))
)
INFOMIN = ViewRecipe(
    (
        View(16, 2, jitter=(0.8, 0.8, 0.8, 0.2), blur=0.5, rand_augment=2),
        View(8, 4, scale=(0.6, 1.0), local=True, jigsaw=2),
    ),
    color_space="lab",
)


def dataset(make):
    return source_from_dataset([make(k) for k in range(COUNT)], labels=[k % 3 for k in range(COUNT)])


def folder_of_files(path):
    return open_source(str(write_folder(path / "images", COUNT, "012"))).train


def tars(path):
    for first, last in ((0, 5), (5, 6), (6, 18)):
        write_tar(path / f"tars/{first:03}.tar", samples(range(first, last)))
    return open_source(str(path / "tars/*.tar")).train


def tfrecords(path):
    for first, last in ((0, 5), (5, 18)):
        write_tfrecord(path / f"records/train-{first:05}-of-00018", imagenet_records(range(first, last)))
    return open_source(str(path / "records")).train


def arrays(_=None, count=COUNT, channels=1, labels=True):
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 14, channels), dtype=np.uint8)
    return ArraySource(images, np.arange(count) % 3 if labels else None, "abc", "thing")


SOURCES = {
    "folder": folder_of_files,
    "tar": tars,
    "tfrecord": tfrecords,
    "array": arrays,
    "bytes": lambda _: dataset(lambda k: encode(picture(k, (20 + k, 24)), "PNG")),
    "PIL": lambda _: dataset(lambda k: picture(k, (20 + k, 24)).convert("L" if k % 4 else "RGB")),
    "NumPy": lambda _: dataset(lambda k: np.array(picture(k, (20 + k, 30 - k)))),
}


@pytest.fixture
def run(open_loader):
    """Return each step's batches, one per rank, of an epoch."""

    def batches(source, recipe, batch_size, *, world_size=1, epoch=1, start=0, **options):
        options["world_size"] = world_size
        ranks = [open_loader(source, recipe, batch_size, rank=rank, **options) for rank in range(world_size)]
        return list(zip(*(loader.epoch(epoch, start) for loader in ranks), strict=True))

    return batches


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [*((kind, COLOR) for kind in SOURCES), ("folder", LARGE), pytest.param("folder", INFOMIN, marks=pytest.mark.slow)],
)
def test_batches_do_not_depend_on_start_threads_and_ranks(run, tmp_path, kind, recipe):
    source = SOURCES[kind](tmp_path)
    straight = run(source, recipe, 4)
    assert (len(source), len(straight)) == (COUNT, 4)
    for (batch,) in straight:
        assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
    assert_same(run(source, recipe, 4, start=3, threads=1, prefetch=3), straight[3:])
    assert_same(run(source, recipe, 2, start=1, threads=3, world_size=2), straight[1:])


def test_batch_has_documented_shapes_types_and_memory(open_loader, folder):
    batches = open_loader(FolderSource(folder), COLOR, 4).epoch(0)
    batch = next(batches)
    assert [tuple(v.shape) for v in batch.views] == [(2, 4, 3, 16, 16), (3, 4, 3, 8, 8)]
    for view in batch.views:
        flat = view.flatten(0, 1)
        assert view.dtype == torch.float32
        assert flat.data_ptr() == view.data_ptr()
        assert flat.is_contiguous(memory_format=torch.channels_last)
    assert (batch.indices.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    copies = [views.clone() for views in batch.views]
    list(batches)  # must not overwrite the first batch
    assert all(torch.equal(a, b) for a, b in zip(batch.views, copies, strict=True))
    assert next(open_loader(arrays(labels=False), GREY, 4).epoch(0)).labels is None


def test_abandoned_epoch_leaves_no_trace(open_loader, folder):
    loader = open_loader(FolderSource(folder), COLOR, 2)
    expected = [[batch] for batch in loader.epoch(5)]
    for _ in zip(range(2), loader.epoch(4), strict=False):
        pass
    half = loader.epoch(4)
    next(half)
    assert_same([[batch] for batch in loader.epoch(5)], expected)
    assert list(half) == []


def test_epoch_has_every_image_once_and_drops_others(open_loader):
    loader, other_seed = (open_loader(arrays(count=22), GREY, 5, seed=seed) for seed in (0, 1))
    epochs = [seen(loader.epoch(epoch)) for epoch in range(5)] + [seen(other_seed.epoch(0))]
    assert all(len(indices) == len(set(indices)) == 20 for indices in epochs)
    assert len({tuple(indices) for indices in epochs}) == 6
    assert len({frozenset(indices) for indices in epochs}) > 1


@pytest.mark.parametrize(("count", "world_size"), [(12, 1), (13, 1), (13, 2), (9, 2), (3, 4)])
def test_evaluation_has_every_image_once_in_order(run, count, world_size):
    options = {"shuffle": False, "drop_last": False, "world_size": world_size}
    steps = run(arrays(count=count), evaluation_view(GREY, 8), 4, **options)
    batches = [batch for step in steps for batch in step]
    assert len(steps) == -(-count // (4 * world_size))
    assert seen(batches) == list(range(count))
    assert all(len(batch.labels) == batch.views[0].shape[1] == len(batch.indices) for batch in batches)


def test_batches_have_no_labels_on_request(open_loader):
    assert next(open_loader(arrays(), GREY, 4).epoch(0)).labels is not None
    assert next(open_loader(arrays(), GREY, 4, labels=False).epoch(0)).labels is None


def test_smaller_last_batch_passes_the_branches(open_loader, folder):
    loader = open_loader(FolderSource(folder), INFOMIN, 5, drop_last=False)
    for epoch in range(2):
        assert [len(batch.indices) for batch in loader.epoch(epoch)] == [5, 5, 2]


@pytest.mark.parametrize(("channels", "recipe"), [(1, RAW), (3, GREY), (1, GREY), (3, RAW)])
def test_arrays_are_converted_to_the_recipes_channels(open_loader, channels, recipe):
    source = arrays(count=8, channels=channels)
    batches = list(open_loader(source, evaluation_view(recipe, 12), 4).epoch(0))
    assert len(batches) == 2
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (recipe.mean, recipe.std))
    for batch in batches:
        views = batch.views[0][0] * std + mean
        for view, i in zip(views, batch.indices, strict=True):
            image = Image.fromarray(source.images[i].squeeze()).convert("L" if recipe.channels == 1 else "RGB")
            central = np.array(image, float).reshape(12, 14, -1)[:, 1:13]
            np.testing.assert_allclose(view.permute(1, 2, 0).numpy() * 255, central, atol=1)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({name: value}, name) for name, value in (("batch_size", 0), ("threads", 0), ("prefetch", 0), ("rank", -1))),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"batch_size": 12, "world_size": 2}, "thing: a batch of 24 images"),
    ],
)
def test_loader_with_invalid_number_names_it(options, name):
    with pytest.raises(DataError, match=f"^{name}"):
        Loader(arrays(), GREY, **{"batch_size": 2, **options})


def test_loader_reads_ahead(open_loader):
    source, read = arrays(count=40), []
    inner = source.read
    source.read = lambda i: read.append(i) or inner(i)
    next(open_loader(source, GREY, 2, prefetch=2, threads=2).epoch(0))
    # Of 40 images, 2 are out, 4 are being made, 4 are in the graph, and 8 are being read.
    assert 6 <= len(read) <= 18


def test_close_ends_the_threads():
    before = set(threading.enumerate())
    loader = Loader(arrays(), GREY, 4)
    next(loader.epoch(0))
    assert set(threading.enumerate()) > before
    loader.close()
    assert set(threading.enumerate()) == before


def test_loops_are_epochs_as_with_a_dataloader(open_loader):
    loader, other = (open_loader(arrays(), GREY, 4) for _ in range(2))
    expected = [seen(other.epoch(epoch)) for epoch in range(3)]
    assert len(loader) == loader.steps_per_epoch == 4
    assert [seen(loader), seen(loader)] == expected[:2]
    next(iter(loader))  # a loop that is left early
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (2, 4)
    assert seen(loader) != expected[2]
    assert loader.state_dict()["epoch"] == 4


def images(steps):
    """The (number, views) of each image of all ranks, in order."""
    batches = [batch for parts in steps for batch in parts]
    return [image for batch in batches for image in zip(batch.indices.tolist(), batch.views[0].unbind(1), strict=True)]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_state_continues_on_other_ranks_and_batch_size(open_loader, data):
    """The images keep their order and their views, and the next loop is the next epoch."""
    count, shuffle = data.draw(st.integers(12, 24), "images"), data.draw(st.booleans(), "shuffle")
    sizes = st.tuples(st.integers(1, 4), st.integers(1, 3))
    before, after = data.draw(sizes, "ranks and batch size"), data.draw(sizes, "the same after the restart")

    def loaders(world_size, batch_size, seed):
        options = {"world_size": world_size, "seed": seed, "shuffle": shuffle}
        return [open_loader(arrays(count=count), GREY, batch_size, rank=rank, **options) for rank in range(world_size)]

    ranks = loaders(*before, seed=5)
    step = data.draw(st.integers(0, len(ranks[0])), "step")
    first = images(itertools.islice(zip(*ranks, strict=True), step))
    state, *others = [loader.state_dict() for loader in ranks]
    assert all(other == state for other in others)
    ended = step == len(ranks[0])
    assert (state["epoch"], state["position"]) == (int(ended), 0 if ended else step * before[0] * before[1])
    ranks = loaders(*after, seed=6)
    for loader in ranks:
        loader.load_state_dict(json.loads(json.dumps(state)))
    joined = ([] if ended else first) + images(zip(*ranks, strict=True))
    whole = images(zip(loaders(1, 1, seed=5)[0].epoch(state["epoch"])))
    assert len(whole) - after[0] * after[1] < len(joined) <= len(whole)
    for (i, views), (j, expected) in zip(joined, whole, strict=False):
        assert i == j
        assert torch.equal(views, expected)
    assert ranks[0].state_dict() == state | {"epoch": state["epoch"] + 1, "position": 0}


@pytest.mark.parametrize(
    ("source", "recipe", "options", "name"),
    [
        (arrays(count=17), GREY, {}, "images"),
        (arrays(labels=False), GREY, {}, "data"),
        (arrays(channels=3), GREY, {}, "data"),
        (arrays(), RAW, {}, "views"),
        (arrays(), GREY, {"shuffle": False}, "shuffle"),
    ],
)
def test_state_of_another_loader_is_an_error(open_loader, source, recipe, options, name):
    state = open_loader(arrays(), GREY, 4).state_dict()
    loader = open_loader(source, recipe, 4, **options)
    with pytest.raises(ValueError, match=f"^state: must have {name} [^\n]*$"):
        loader.load_state_dict(state)
    del state["position"]
    with pytest.raises(ValueError, match="position"):
        loader.load_state_dict(state)


DEEP = np.random.default_rng(0).integers(0, 4096, (6, 44, 40, 5)).astype(np.uint16)
LOOK = {"jitter": (0.4, 0.4, 0.4, 0.1), "grey": 0.2, "blur": 0.6, "solarize": 0.3}


def banded(view, channels):
    return ViewRecipe((view,), channels, (0.5,) * channels, (0.25,) * channels, pixel_range=(0.0, 4095.0))


@pytest.mark.parametrize(
    "view",
    [View((56, 24), **LOOK), View((16, 20), 2, **LOOK), View(24, rotate=20), View((20, 32), rand_augment=3, **LOOK)],
)
def test_channels_are_augmented_like_grey_images(open_loader, view):
    (whole,) = open_loader(ArraySource(DEEP), banded(view, 5), 6)
    for k in range(5):
        (one,) = open_loader(ArraySource(DEEP[..., k : k + 1]), banded(view, 1), 6)
        assert torch.equal(one.views[0][:, :, 0], whole.views[0][:, :, k])


def test_channels_are_read_alike_from_every_kind_of_source(open_loader, tmp_path):
    files = []
    for image in DEEP:
        file = io.BytesIO()
        np.save(file, image)
        files.append(file.getvalue())
    (tmp_path / "folder").mkdir()
    for k, content in enumerate(files):
        (tmp_path / "folder" / f"{k}.npy").write_bytes(content)
    write_tar(tmp_path / "tar" / "a.tar", [(f"{k}.npy", content) for k, content in enumerate(files)])
    write_tfrecord(tmp_path / "records" / "a.tfrecord", [example(image=content) for content in files])
    tensors = [torch.from_numpy(image.astype(np.int32)).permute(2, 0, 1) for image in DEEP]
    sources = [open_source(str(tmp_path / name)).train for name in ("folder", "tar", "records")]
    sources += [source_from_dataset(tensors, labelled=False)]
    batches = [next(iter(open_loader(source, banded(View((30, 20)), 5), 6))) for source in sources]
    expected = next(iter(open_loader(ArraySource(DEEP), banded(View((30, 20)), 5), 6)))
    for batch in batches:
        assert torch.equal(batch.views[0], expected.views[0])


def test_deep_image_without_a_range_is_a_bad_image(open_loader):
    loader = open_loader(ArraySource(DEEP[..., :3]), ViewRecipe((View(16),)), 6)
    with pytest.raises(DataError, match="--pixel_range"):
        next(iter(loader))
