import os
import socket
from pathlib import Path

import numpy as np
import pytest

from fasttrain.pipelines import ArraySource, DataError, Subset, open_source
from fasttrain.pipelines.sources.listing import digest_of, listing_of

from .shard_files import imagenet_records, samples, write_tar, write_tfrecord
from .test_base import names, write

TINY = "train/n1/images/1.JPEG train/n2/images/2.JPEG val/images/3.JPEG val/images/4.JPEG test/images/5.JPEG"


@pytest.mark.parametrize(
    ("files", "split_like"),
    [
        ("Training/a/1 Testing/a/2", ("Testing", "Training")),
        ("train/1 unlabeled/2", ("train", "unlabeled")),
        ("train/1 holdout/2", ("holdout", "train")),
        ("TRAIN_SET/1 Held-Out/2 misc/3", ("Held-Out", "TRAIN_SET")),
        ("train/1 bus/2 car/3", ()),  # a vehicle among others
        ("a/train/1 b/train/2", ()),
        ("train/a/1 train/b/2 val/a/3", ()),
    ],
)
def test_listing_names_classes_that_look_like_splits(tmp_path, files, split_like):
    write(tmp_path, *(f"{file}.png" for file in files.split()))
    assert open_source(str(tmp_path)).summary.train.split_like == split_like


def test_listing_counts_what_is_left_out(tmp_path):
    write(tmp_path, "a/1.jpg", "a/2.JFIF", "b/3.png", "b/.hidden.gif")
    others = ("a/4.gif", "a/5.GIF", "b/6.avif", "b/7.ppm", "b/8.jp2", "b/notes.txt", "b/README", "b/cam.0031")
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    listing = open_source(str(tmp_path)).summary.train
    assert (listing.images, listing.classes, listing.labels_from) == (3, ("a", "b"), "sub-folders")
    assert listing.left_out == {".gif": 2, ".avif": 1, ".ppm": 1, ".jp2": 1, ".txt": 1, "": 2}
    assert listing.pictures_left_out == {".gif": 2, ".avif": 1, ".jp2": 1, ".ppm": 1}


@pytest.mark.parametrize(
    ("name", "message"), [("data.arrow", "give hf:"), ("a.gif", "; found 1 .gif"), ("README", "; found 1 without one")]
)
def test_folder_without_images_says_what_it_holds(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"^{tmp_path}: .*{message}"):
        open_source(str(tmp_path))


def test_special_files_are_left_out_and_named(tmp_path):
    """Regression: a FIFO among the images stopped the run without a word, and a circular link ended it."""
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    os.mkfifo(tmp_path / "a/fifo.jpg")
    os.mkfifo(tmp_path / "a/fifo.tar")
    os.symlink("loop.jpg", tmp_path / "b/loop.jpg")
    os.symlink("/dev/zero", tmp_path / "b/zero.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        cwd = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket is short
        server.bind("b/socket.jpg")
        os.chdir(cwd)
    source = open_source(str(tmp_path)).train
    assert names(source) == ["1.jpg", "2.jpg"]
    special = {kind: (count, Path(first).name) for kind, (count, first) in source.listing.special.items()}
    assert special == {
        "FIFO": (2, "fifo.jpg"),
        "link that leads to itself": (1, "loop.jpg"),
        "device": (1, "zero.jpg"),
        "socket": (1, "socket.jpg"),
    }


def test_links_that_lead_back_up_are_not_followed(tmp_path):
    """Regression: a link to the data set's folder doubled its images, with wrong labels."""
    write(tmp_path, "data/a/1.jpg", "data/b/2.jpg")
    for name, target in (("a/up", "../.."), ("b/self", "."), ("c", "..")):
        os.symlink(target, tmp_path / "data" / name)
    source = open_source(str(tmp_path / "data")).train
    assert (names(source), source.classes) == (["1.jpg", "2.jpg"], ("a", "b"))
    links = [os.path.relpath(link, tmp_path / "data") for link in source.listing.links_back]
    assert links == ["a/up", "b/self", "c"]


def test_annotations_give_the_held_out_labels(tmp_path):
    write(tmp_path, *TINY.split())
    (tmp_path / "val/val_annotations.txt").write_text("3.JPEG\tn2\t0\t0\t9\t9\n4.JPEG\tn1\t0\t0\t9\t9\n")
    splits = open_source(str(tmp_path))
    assert (splits.val.labels.tolist(), splits.val.classes) == ([1, 0], ("n1", "n2"))
    assert splits.summary.val.labels_from == "val_annotations.txt"
    assert (splits.summary.unused, splits.summary.held_out) == (("test/",), 2)
    assert open_source(str(tmp_path / "val")).train.labels.tolist() == [1, 0]
    (tmp_path / "val/val_annotations.txt").write_text("3.JPEG\tn2\n")
    splits = open_source(str(tmp_path))
    assert (splits.val.labels, splits.summary.val.unlabelled) == (None, "val_annotations.txt has no line for 4.JPEG")


@pytest.mark.parametrize(
    ("files", "reason"), [("1", "directly"), ("only/1", "only"), ("one/1 train/x/1 train/y/2 val/3", "")]
)
def test_listing_gives_the_reason_for_no_labels(tmp_path, files, reason):
    write(tmp_path, *(f"{file}.png" for file in files.split()))
    summary = open_source(str(tmp_path)).summary
    assert reason in summary.train.unlabelled
    assert bool(reason) == (not summary.train.labels_from)


def test_digest_changes_with_the_listing_but_not_the_place(tmp_path):
    digests = []
    for name, files in (("one", "a/1 b/2"), ("two", "a/1 b/2"), ("three", "a/1 b/3"), ("four", "a/1 c/2")):
        write(tmp_path / name, *(f"{file}.png" for file in files.split()))
        digests.append(open_source(str(tmp_path / name)).summary.digest)
    for name, numbers in (("five", (0, 1)), ("six", (0, 2))):
        write_tar(tmp_path / name / "a.tar", samples(numbers))
        digests.append(open_source(str(tmp_path / name)).summary.digest)
    pixels = np.zeros((2, 4, 4, 1), np.uint8)
    arrays = [ArraySource(pixels, labels) for labels in ([0, 1], [1, 0])]
    digests += [listing_of(source).digest for source in (*arrays, Subset(arrays[0], [0]))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1
    assert digest_of("ab", "c") != digest_of("a", "bc")


def test_listing_of_shards_survives_the_cache(tmp_path):
    members = [("a.0001.jpg", b"x"), ("a.0002.jpg", b"x"), ("b.gif", b"x")]
    write_tar(tmp_path / "tars/a.tar", members)
    write_tfrecord(tmp_path / "records/a.v2.tfrec", imagenet_records(range(3)))
    for folder in ("tars", "records"):
        first, again = (open_source(str(tmp_path / folder), cache=tmp_path / "index").train for _ in range(2))
        assert first.listing == again.listing
    tars = open_source(str(tmp_path / "tars"), cache=tmp_path / "index").train.listing
    assert (tars.images, tars.pictures_left_out, len(tars.notes)) == (2, {".gif": 1}, 1)
    assert tars.unlabelled.startswith("2 of 2 images")
    assert first.listing.labels_from.startswith("image/class/label")


def test_packed_archives_next_to_shards_are_named(tmp_path):
    write_tar(tmp_path / "a.tar", samples(range(2)))
    (tmp_path / "b.tar.gz").touch()
    assert open_source(str(tmp_path)).summary.train.pictures_left_out == {".gz": 1}


def test_folder_without_images_is_no_class_and_is_named(tmp_path):
    write(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "empty").mkdir()
    listing = open_source(str(tmp_path)).summary.train
    assert listing.classes == ("cat", "dog")
    assert "empty" in listing.notes[0]
