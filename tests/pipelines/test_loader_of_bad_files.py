"""Files that cannot be read: named once, replaced, left out of evaluations, and the end of a run if they are many."""

import io
import logging

import pytest
import torch

from fasttrain.pipelines import DataError, FolderSource, evaluation_view

from .loading import COLOR, RAW, same, seen
from .sources.shard_files import picture


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

    def fail(*stream):  # without one where the loader lets the graph finish
        raise RuntimeError("the device is gone")

    loader._pipeline.share_outputs = fail
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(batches)  # the next ones are made already
    assert len(list(loader.epoch(1))) == 3
