"""Files that cannot be read or decoded, and shards that change while the loader runs."""

import logging

import pytest
import torch

from fasttrain.pipelines import DataError, FolderSource, evaluation_view

from .loading import COLOR, RAW, assert_same, seen
from .sources.shard_files import encode, picture


def without_tables(data):
    """Return the JPEG with a Huffman table that no decoder accepts. Its header stays valid."""
    tables = data.find(b"\xff\xc4")
    return data[: tables + 5] + b"\xff" * 16 + data[tables + 21 :]


def png_with_a_hole(_):
    data = encode(picture(4), "PNG")
    return data[: len(data) // 2] + bytes(40) + data[len(data) // 2 + 40 :]


KINDS = {  # of bad files: how a JPEG becomes one, and the reason in the log
    "truncated": (lambda data: data[:-100], "truncated: a JPEG without its end marker"),
    "empty": (lambda data: b"", "the file is empty"),
    "text": (lambda data: b"this is no picture", "not an image"),
    "corrupt": (without_tables, "corrupt: the decoder rejects it"),
    "corrupt in the middle": (png_with_a_hole, "corrupt: the decoder rejects it"),
    "bomb": (  # 20 x 24 pixels become 20,000 x 20,000
        lambda data: data.replace(b"\x00\x14\x00\x18", b"\x4e\x20\x4e\x20", 1),
        "its 20000 x 20000 pixels are more than the 100,000,000 allowed; scale it down",
    ),
    "vanished": (None, "No such file or directory"),
}


def spoil(folder, kind):
    """Make file 4 of the folder bad, and return its path."""
    path, change = folder / "a/04.jpg", KINDS[kind][0]
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_file_is_logged_once_and_replaced(open_loader, folder, caplog, kind):
    caplog.set_level(logging.WARNING, "fasttrain.data")
    source = FolderSource(folder)
    bad, good = 2, 9  # a/04.jpg is image 2, and image 9 is one stride of 7 further
    intact = list(open_loader(source, COLOR, 4).epoch(0))
    path, reason = spoil(folder, kind), KINDS[kind][1]
    loader = open_loader(source, COLOR, 4)
    epochs = [list(loader.epoch(epoch)) for epoch in range(3)]
    assert [record.getMessage() for record in caplog.records] == [f"{path}: {reason}; left out from now on"]
    assert loader.bad == {path: reason}
    for epoch in epochs:
        assert sorted(seen(epoch)) == sorted([*(set(range(12)) - {bad}), good])
    for before, after in zip(intact, epochs[0], strict=True):
        assert [good if i == bad else i for i in before.indices.tolist()] == after.indices.tolist()
        for row in (before.indices != bad).nonzero().flatten():
            assert torch.equal(before.views[0][:, row], after.views[0][:, row])
    restart = open_loader(source, COLOR, 4).epoch(0, 1)
    assert_same([[batch] for batch in restart], [[batch] for batch in epochs[0][1:]])


@pytest.mark.parametrize("kind", ["text", "corrupt"])
def test_bad_file_is_left_out_of_an_evaluation(open_loader, folder, kind):
    source = FolderSource(folder)
    spoil(folder, kind)
    loader = open_loader(source, evaluation_view(COLOR, 16), 5, shuffle=False, drop_last=False)
    assert [batch.indices.tolist() for batch in loader.epoch(0)] == [[0, 1, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_many_corrupt_files_are_replaced(open_loader, folder):
    source = FolderSource(folder)
    for path in sorted(folder.rglob("*.jpg"))[:8]:
        path.write_bytes(without_tables(path.read_bytes()))
    loader = open_loader(source, COLOR, 2)
    indices = seen(loader.epoch(0)) + seen(loader.epoch(1))
    assert (len(indices), set(indices), len(loader.bad)) == (24, {8, 9, 10, 11}, 8)


def test_too_many_bad_files_end_a_shuffled_epoch(open_loader, tmp_path):
    for k in range(200):
        (tmp_path / f"{k:03}.png").write_bytes(encode(picture(k), "PNG") if k % 5 else b"no picture")
    source = FolderSource(tmp_path)
    loader = open_loader(source, RAW, 10, max_bad_fraction=0.1)
    with pytest.raises(DataError, match=r" 0\.1 .*max_bad_fraction.*\.png: not an"):
        list(loader.epoch(0))
    assert 11 <= len(loader.bad) < 40  # other threads may have met more
    assert len(list(open_loader(source, RAW, 10, max_bad_fraction=0.3).epoch(0))) == 20


@pytest.mark.parametrize("content", [b"no picture", None])
def test_epoch_without_a_readable_file_is_an_error(open_loader, folder, content):
    source = FolderSource(folder)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(content or without_tables(path.read_bytes()))
    with pytest.raises(DataError, match=r"none of its 12 images.*\.jpg: "):
        list(open_loader(source, COLOR, 4).epoch(0))


def test_error_of_the_graph_without_a_bad_file_is_raised(open_loader, folder):
    loader = open_loader(FolderSource(folder), COLOR, 4)
    batches = loader.epoch(0)
    next(batches)

    def fail(*_):
        raise RuntimeError("the device is gone")

    loader._pipeline.share_outputs = fail
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(batches)
    assert len(list(loader.epoch(1))) == 3
