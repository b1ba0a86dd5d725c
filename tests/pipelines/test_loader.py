import io
import logging
import struct
import sys
import threading
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fasttrain.pipelines import ArraySource, DataError, FolderSource, Loader, View, ViewRecipe, evaluation_view

COLOR = ViewRecipe((View(16, 2, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2), View(8, 3, scale=(0.1, 0.4), local=True)))
GREY = ViewRecipe((View(8, 2, rotate=10, jitter=(0.4, 0.4, 0, 0)),), 1, (0.1,), (0.3,))
INFOMIN = ViewRecipe(
    (
        View(16, 2, jitter=(0.8, 0.8, 0.8, 0.2), blur=0.5, rand_augment=2),
        View(8, 4, scale=(0.6, 1.0), local=True, jigsaw=2),
    ),
    color_space="lab",
)
RAW = ViewRecipe((View(16),), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def arrays(count=20, channels=1, labels=True):
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 14, channels), dtype=np.uint8)
    return ArraySource(images, np.arange(count) % 3 if labels else None, "abc", "thing")


def picture(k):
    """Smooth picture number ``k``, 24 x 20 pixels."""
    coarse = np.random.default_rng(k).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((24, 20), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for k in range(12):
        path = tmp_path / f"data/{'ab'[k % 2]}/{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k).save(path, quality=95)
    return tmp_path / "data"


@pytest.fixture
def open_loader():
    """Make loaders that are closed at the end of the test."""
    opened = []

    def make(source, recipe, batch_size, **options):
        opened.append(Loader(source, recipe, batch_size, **options))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def same(one, other):
    views = all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
    return views and torch.equal(one.indices, other.indices)


def seen(batches):
    return torch.cat([batch.indices for batch in batches]).tolist()


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


@pytest.mark.parametrize("channels", [1, 3])
def test_unusual_files_are_read_as_pil_reads_them(open_loader, tmp_path, channels):
    exif = Image.Exif()
    exif[0x112] = 6
    picture(0).save(tmp_path / "0.jpg", "PNG")  # a lying suffix
    picture(1).convert("L").save(tmp_path / "1.jpg")
    picture(2).convert("CMYK").save(tmp_path / "2.jpg")
    picture(3).convert("RGBA").save(tmp_path / "3.png")
    picture(4).convert("P").save(tmp_path / "4.png")
    picture(5).save(tmp_path / "5.bmp")
    picture(6).save(tmp_path / "6.webp")
    picture(7).save(tmp_path / "7.tif")
    picture(8).save(tmp_path / "8.jpg", exif=exif)
    picture(9).save(tmp_path / "9.png", exif=exif)
    recipe = ViewRecipe((View(16),), channels, (0.0,) * channels, (1.0,) * channels)
    loader = open_loader(FolderSource(tmp_path), evaluation_view(recipe, 20), 10, shuffle=False)
    batch = next(loader.epoch(0))
    assert loader.bad == {}
    for k, view in enumerate(batch.views[0][0] * 255):
        theirs = Image.open(loader.source.describe(k)).convert("L" if channels == 1 else "RGB")
        if k > 7:
            theirs = theirs.transpose(Image.Transpose.ROTATE_270)
        left, top = (theirs.width - 20) // 2, (theirs.height - 20) // 2
        expected = np.array(theirs.crop((left, top, left + 20, top + 20)), float).reshape(20, 20, -1)
        assert np.abs(view.permute(1, 2, 0).numpy() - expected).mean() < 1


def test_sixteen_bit_png(open_loader, tmp_path):
    wide = np.arange(400, dtype=np.uint16).reshape(20, 20) * 160
    Image.fromarray(wide).save(tmp_path / "wide.png")
    loader = open_loader(FolderSource(tmp_path), evaluation_view(RAW, 20), 1)
    view = next(loader.epoch(0)).views[0][0, 0] * 255
    for channel in view:
        np.testing.assert_allclose(channel.numpy(), wide / 257, atol=1)


def central(image, side=20):
    """The central square of a PIL image, as pixels."""
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(image.crop((left, top, left + side, top + side)), float).reshape(side, side, -1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("PNG", {}),
        ("WEBP", {"quality": 95}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
    ],
)
def test_files_are_turned_as_pil_turns_them(open_loader, tmp_path, kind, options):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        picture(orientation).save(tmp_path / f"{orientation}.{kind}", kind, exif=exif, **options)
    loader = open_loader(FolderSource(tmp_path), evaluation_view(RAW, 20), 8, shuffle=False)
    batch = next(loader.epoch(0))
    assert loader.bad == {}
    for k, view in enumerate(batch.views[0][0] * 255):
        theirs = ImageOps.exif_transpose(Image.open(loader.source.describe(k)))
        assert (theirs.width > theirs.height) == (k < 4)
        assert np.abs(view.permute(1, 2, 0).numpy() - central(theirs)).mean() < 1


def png_of_16_bits(pixels):
    """PNG of uint16 [H, W, C], which PIL reads but does not write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def test_deep_and_transparent_files_are_read_as_pil_reads_them(open_loader, tmp_path):
    deep = np.random.default_rng(0).integers(0, 2**16, (20, 24, 4), dtype=np.uint16)
    deep = np.array(Image.fromarray((deep >> 8).astype(np.uint8))).astype(np.uint16) * 257
    for channels in (1, 2, 3, 4):
        (tmp_path / f"{channels}.png").write_bytes(png_of_16_bits(deep[..., 4 - channels :]))
    picture(4).convert("LA").save(tmp_path / "5.png")
    picture(5).quantize(32).save(tmp_path / "6.png", transparency=3)
    picture(6).convert("1").save(tmp_path / "7.png")
    picture(7).convert("CMYK").save(tmp_path / "8.tif")
    picture(8).convert("RGBA").save(tmp_path / "9.webp", lossless=True, exact=True)
    loader = open_loader(FolderSource(tmp_path), evaluation_view(RAW, 20), 9, shuffle=False)
    batch = next(loader.epoch(0))
    assert loader.bad == {}
    for k, view in enumerate(batch.views[0][0] * 255):
        theirs = Image.open(loader.source.describe(k))
        expected = central(theirs) / 257 if theirs.mode == "I;16" else central(theirs.convert("RGB"))
        assert np.abs(view.permute(1, 2, 0).numpy() - expected).mean() < 1, loader.source.describe(k)


def without_tables(data):
    """The JPEG with a Huffman table that no decoder accepts; its header still reads well."""
    tables = data.find(b"\xff\xc4")
    return data[: tables + 5] + b"\xff" * 16 + data[tables + 21 :]


def png_with_a_hole(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    return data[: len(data) // 2] + bytes(40) + data[len(data) // 2 + 40 :]


def spoil(folder, kind):
    """Make file 4 of the folder bad; returns its path."""
    path = folder / "a/04.jpg"
    data = path.read_bytes()
    path.unlink()
    content = {
        "truncated": data[: len(data) - 100],
        "cut in the header": data[:200],
        "empty": b"",
        "text": b"this is no picture",
        "corrupt": without_tables(data),
        "corrupt in the middle": png_with_a_hole(picture(4)),
        "bomb": data.replace(b"\x00\x14\x00\x18", b"\x4e\x20\x4e\x20", 1),  # 20 x 24 becomes 20,000 x 20,000
    }
    if kind != "vanished":
        path.write_bytes(content[kind])
    return str(path)


REASONS = {
    "truncated": "truncated: a JPEG without its end marker",
    "cut in the header": "truncated: a JPEG without image data",
    "empty": "the file is empty",
    "text": "not an image",
    "corrupt": "corrupt: the decoder refuses it",
    "corrupt in the middle": "corrupt: the decoder refuses it",
    "bomb": "its 20000 x 20000 pixels are more than the 100,000,000 allowed; scale it down",
    "vanished": "No such file or directory",
}


@pytest.mark.parametrize("kind", REASONS)
def test_bad_file_is_named_once_and_replaced(open_loader, folder, caplog, kind):
    caplog.set_level(logging.WARNING, "fasttrain.data")
    source = FolderSource(folder)
    bad, good = 2, 9  # a/04.jpg is image 2; the image at a stride of 7 takes its place
    assert source.describe(bad) == str(folder / "a/04.jpg")
    untouched = list(open_loader(source, COLOR, 4).epoch(0))
    path = spoil(folder, kind)
    loader = open_loader(source, COLOR, 4)
    batches = [list(loader.epoch(epoch)) for epoch in range(3)]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {REASONS[kind]}; left out from now on"]
    assert loader.bad == {path: REASONS[kind]}
    for epoch in batches:
        indices = seen(epoch)
        assert sorted(indices) == sorted([*(set(range(12)) - {bad}), good])
    for before, after in zip(untouched, batches[0], strict=True):
        assert [good if i == bad else i for i in before.indices.tolist()] == after.indices.tolist()
        for row in (before.indices != bad).nonzero().flatten():
            assert torch.equal(before.views[0][:, row], after.views[0][:, row])
    assert all(same(a, b) for a, b in zip(open_loader(source, COLOR, 4).epoch(0, 1), batches[0][1:], strict=True))


@pytest.mark.parametrize("kind", ["text", "corrupt"])
def test_bad_file_is_left_out_of_an_evaluation(open_loader, folder, kind):
    source = FolderSource(folder)
    spoil(folder, kind)
    loader = open_loader(source, evaluation_view(COLOR, 16), 5, shuffle=False, drop_last=False)
    assert [batch.indices.tolist() for batch in loader.epoch(0)] == [[0, 1, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_many_corrupt_files(open_loader, folder):
    source = FolderSource(folder)
    for path in sorted(folder.rglob("*.jpg"))[:8]:
        path.write_bytes(without_tables(path.read_bytes()))
    loader = open_loader(source, COLOR, 2)
    indices = seen(loader.epoch(0)) + seen(loader.epoch(1))
    assert len(indices) == 24
    assert set(indices) == {8, 9, 10, 11}
    assert len(loader.bad) == 8


def test_too_many_bad_files_stop_a_shuffled_epoch(open_loader, tmp_path):
    for k in range(200):
        content = b"no picture" if k % 5 == 0 else io.BytesIO()
        if k % 5:
            picture(k).save(content, "PNG")
            content = content.getvalue()
        (tmp_path / f"{k:03}.png").write_bytes(content)
    source = FolderSource(tmp_path)
    few = open_loader(source, RAW, 10, max_bad_fraction=0.1)
    with pytest.raises(
        DataError, match=r"\d+ of \d+ images cannot be read, more than the fraction 0\.1 .*\.png: not an"
    ):
        list(few.epoch(0))
    assert 11 <= len(few.bad) < 40  # other threads may have met some more
    assert len(list(open_loader(source, RAW, 10, max_bad_fraction=0.3).epoch(0))) == 20


@pytest.mark.parametrize("content", [b"no picture", None])
def test_nothing_readable_is_left(open_loader, folder, content):
    source = FolderSource(folder)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(content or without_tables(path.read_bytes()))
    with pytest.raises(DataError, match=r"none of its 12 images can be read; .*\.jpg: (not an image|corrupt)"):
        list(open_loader(source, COLOR, 4).epoch(0))


def test_a_failure_that_no_file_explains_is_not_hidden(open_loader, folder):
    loader = open_loader(FolderSource(folder), COLOR, 4)
    batches = loader.epoch(0)
    next(batches)

    def fail(stream):
        raise RuntimeError("the device is gone")

    loader._pipeline.share_outputs = fail
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(batches)  # the next ones are made already
    assert len(list(loader.epoch(1))) == 3


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
