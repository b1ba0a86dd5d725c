import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.errors import ConfigError
from fasttrain.pipelines import (
    ArraySource,
    DataError,
    FolderSource,
    MixtureSource,
    View,
    ViewRecipe,
    evaluation_view,
    open_source,
)
from tests.pipelines.loading import RAW, assert_same, seen

from .shard_files import jpeg, samples, write_folder, write_tar

RECIPE = ViewRecipe((View(8, 2, jitter=(0.4, 0.4, 0.4, 0.1)),))


def arrays(count, name="array", labels=True, classes=(), channels=3):
    pixels = np.random.default_rng(count).integers(0, 256, (count, 12, 10, channels), dtype=np.uint8)
    return ArraySource(pixels, np.arange(count) % 2 if labels else None, classes, name)


def mixture(weights=()):
    return MixtureSource([arrays(5, "five"), arrays(20, "twenty"), arrays(7, "seven")], weights)


def test_images_of_all_sources_are_numbered_in_turn():
    source = mixture()
    assert (len(source), source.name, source.channels, source.encoded) == (32, "five + twenty + seven", 3, False)
    places = {4: "five 4", 5: "twenty 0", 24: "twenty 19", 25: "seven 0", 31: "seven 6"}
    assert {i: source.describe(i) for i in places} == places
    assert (source.read(25) == source.sources[2].read(0)).all()
    assert source.stamp(25) == source.sources[2].stamp(0)
    assert sorted(source.order(3, 4).images.tolist()) == list(range(32))
    assert not source.order(3, 4).rounds.any()


def test_weights_are_the_shares_of_every_epoch():
    source = mixture((3, 1, 4))
    assert source.quotas == [12, 4, 16]
    assert mixture((1.5e308, 0.5e308, 1e308)).quotas == mixture((3, 1, 2)).quotas  # their sum is no number
    counts = np.zeros(32, int)
    for epoch in range(10):
        images, rounds = source.order(1, epoch)
        assert np.bincount(np.digitize(images, (5, 25))).tolist() == source.quotas
        assert len({*zip(images.tolist(), rounds.tolist(), strict=True)}) == 32  # never the same views twice
        for part in np.array_split(np.digitize(images, (5, 25)), 4):  # evenly over the epoch
            assert np.abs(np.bincount(part, minlength=3) - [3, 1, 4]).max() <= 1
        counts += np.bincount(images, minlength=32)
    # 120, 40 and 160 images of 5, 20 and 7: each source goes through its images again and again, over all epochs.
    assert [sorted(set(part.tolist())) for part in np.split(counts, (5, 25))] == [[24], [2], [22, 23]]


def test_order_depends_on_seed_and_epoch_only():
    orders = [mixture((1, 1, 1)).order(seed, epoch).images.tolist() for seed, epoch in ((0, 7), (0, 7), (0, 8), (1, 7))]
    assert orders[0] == orders[1]
    assert len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize("weights", [(), (3, 1)])
def test_loader_resumes_a_mixture_in_mid_epoch(folder, open_loader, weights):
    """Files and arrays in one batch, on any number of ranks."""

    def loader(**options):
        source = MixtureSource([FolderSource(folder), arrays(20)], weights)
        return open_loader(source, RECIPE, options.pop("batch_size", 8), seed=5, **options)

    expected = [[batch] for epoch in (0, 1) for batch in loader().epoch(epoch)]
    assert len(expected) == 8
    assert_same([[batch] for batch in loader(threads=3).epoch(1, 2)], expected[6:])
    ranks = [loader(batch_size=4, rank=rank, world_size=2).epoch(1, 1) for rank in (0, 1)]
    assert_same([list(parts) for parts in zip(*ranks, strict=True)], expected[5:])
    first = loader()
    batches = iter(first)
    for _ in range(3):
        next(batches)
    again = loader()
    again.load_state_dict(first.state_dict())
    assert_same([[batch] for batch in again], expected[3:4])
    images = seen(batch for (batch,) in expected[:4])
    assert (max(images.count(i) for i in images) > 1) == bool(weights)
    with pytest.raises(ValueError, match="data"):
        open_loader(MixtureSource([FolderSource(folder), arrays(20)], (1, 9)), RECIPE, 8).load_state_dict(
            first.state_dict()
        )


def test_repeated_image_has_other_views(open_loader):
    source = MixtureSource([arrays(2), arrays(30)], (1, 1))
    loader = open_loader(source, RECIPE, 32, seed=1)
    (batch,) = loader.epoch(0)
    views = batch.views[0][0][batch.indices == 0]
    assert len(views) == 8
    assert len(torch.unique(views.flatten(1), dim=0)) == 8


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_among_files_keep_their_pixels(open_loader, tmp_path, channels):
    array = arrays(3, channels=channels)
    source = MixtureSource([FolderSource(write_folder(tmp_path, 4, "ab")), array])
    view = evaluation_view(RAW, 10)
    (batch,) = open_loader(source, view, 7, shuffle=False).epoch(0)
    plain = open_loader(array, view, 3, shuffle=False)
    for both, alone in zip(batch.views[0][0][4:], next(plain.epoch(0)).views[0][0], strict=True):
        assert (both - alone).abs().max() < 2 / 255


def test_labels_are_merged_by_name():
    one, two = arrays(4, classes=("cat", "dog")), arrays(4, classes=("dog", "eel"))
    source = MixtureSource([one, two, arrays(2)])
    assert source.classes == ("cat", "dog", "eel", "0", "1")
    assert source.labels.tolist() == [0, 1, 0, 1, 1, 2, 1, 2, 3, 4]
    held_out = MixtureSource([two], classes=source.classes)
    assert held_out.labels.tolist() == [1, 2, 1, 2]
    with pytest.raises(DataError, match="'eel' is not among the training classes"):
        MixtureSource([two], classes=one.classes)
    unlabelled = MixtureSource([one, arrays(3, "plain", labels=False)])
    assert (unlabelled.labels, unlabelled.classes, unlabelled.listing.unlabelled) == (None, (), "plain has none")


def test_listing_of_a_mixture_adds_up(tmp_path):
    write_folder(tmp_path / "a", 4, "xy")
    (tmp_path / "a/x/z.gif").write_bytes(b"")
    write_tar(tmp_path / "b/b.tar", [*samples(range(3)), ("9.gif", b"")])
    splits = open_source([str(tmp_path / "a"), str(tmp_path / "b")], weights=(1, 6))
    listing = splits.summary.train
    assert (splits.name, listing.images, listing.left_out) == ("a + b", 7, {".gif": 2})
    assert listing.notes == ("a: 4 images, 1 in an epoch", "b: 3 images, 6 in an epoch")
    assert listing.digest != open_source([str(tmp_path / "a"), str(tmp_path / "b")]).summary.train.digest


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ((1,), "one number per source, 3, got 1"),
        ((1, 0, 1), "above 0, got 0"),
        ((1, -2, 1), "got -2"),
        ((1, float("nan"), 1), "got nan"),
        ((1, float("inf"), 1), "got inf"),
        ((1, 1e-6, 1), "no image of twenty"),
    ],
)
def test_invalid_weights_are_refused(weights, problem):
    with pytest.raises(ConfigError, match=f"^--data_weights: .*{problem}"):
        mixture(weights)


def test_paths_of_every_kind_are_mixed(tmp_path):
    """Held-out images are merged, and their labels count in the merged classes."""
    for name, classes in (("one", "ab"), ("two", "bc")):
        write_folder(tmp_path / name / "train", 4, classes)
        write_folder(tmp_path / name / "val", 2, classes)
    write_tar(tmp_path / "three/3.tar", samples(range(3)))
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    splits = open_source([one, two, three])
    assert splits.train.classes == ("a", "b", "c", "0", "1", "2")
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 5]
    assert (splits.val.labels.tolist(), splits.val.classes) == ([0, 1, 1, 2], splits.train.classes)
    assert open_source([one, three], [f"{two}/val/b", three]).val.labels is None
    (tmp_path / "extra/b").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "extra/b/1.png")
    assert open_source([one, two], str(tmp_path / "extra")).val.labels.tolist() == [1]
    assert open_source([one]).name == "one"
    for paths in (["", one], [one, " "]):
        with pytest.raises(DataError, match="data path is empty"):
            open_source(paths)
    for weights in ((1,), (1, 2, 3)):
        with pytest.raises(ConfigError, match="--data_weights"):
            open_source([one, two], weights=weights)


def test_bad_image_of_a_mixture_is_named(open_loader, tmp_path):
    folder = write_folder(tmp_path, 4, "ab")
    (folder / "a/00.jpg").write_bytes(jpeg(0)[:50])
    loader = open_loader(MixtureSource([FolderSource(folder), arrays(4)], (1, 1)), RAW, 4)
    assert all(len(batch.indices) == 4 for _ in range(2) for batch in loader)
    assert list(loader.bad) == [str(folder / "a/00.jpg")]
