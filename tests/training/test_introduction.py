"""The first lines of a run say what was found and what was left out."""

import os

import pytest

from fasttrain.config.resolve import resolve
from fasttrain.distributed.world import World
from fasttrain.errors import DataError
from fasttrain.models.architectures import create_backbone
from fasttrain.pipelines import open_source
from fasttrain.training import introduction
from fasttrain.training.introduction import check_ranks, data_lines, without_effect
from tests.small_runs import write_images


def _lines(root):
    return data_lines(open_source(str(root)).summary, {})


def _text(root):
    return "\n".join(_lines(root))


def test_images_classes_and_held_out_images_are_counted(images):
    assert _lines(images) == ["noise: 32 training images, 8 held-out images", "2 classes from sub-folders: cat, dog"]


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train", "unlabeled"), ("train", "holdout")])
def test_folders_named_like_splits_are_reported(tmp_path, names):
    root = write_images(tmp_path / "x", train=4, val=4)
    for before, name in zip(("train", "val"), names, strict=True):
        (root / before).rename(root / name)
    assert "named like splits" in _text(root)
    assert all(name in _text(root) for name in names)


def test_files_and_links_that_are_left_out_are_named(tmp_path):
    root = write_images(tmp_path / "x", train=4, val=4)
    for name in ("a.gif", "b.GIF", "c.avif", "d.ppm", "e.jp2", "notes.txt"):
        (root / "train" / "cat" / name).touch()
    (root / "train" / "cat" / "up").symlink_to("..")
    os.mkfifo(root / "train" / "dog" / "pipe.jpg")
    text = _text(root)
    assert "not read: 2 .gif, 1 .avif, 1 .jp2, 1 .ppm" in text
    assert "notes" not in text
    assert "cat/up" in text
    assert "pipe.jpg" in text


def test_many_classes_are_shortened_and_no_labels_are_named(tmp_path, images):
    for i in range(12):
        write_images(tmp_path / "x", train=1, val=0)
        (tmp_path / "x" / "train").rename(tmp_path / "x" / f"class{i:02d}")
    assert "12 classes from sub-folders: class00," in _text(tmp_path / "x")
    assert "class11" not in _text(tmp_path / "x")
    assert "no labels" in _text(images / "train" / "cat")


def test_rank_with_other_images_is_refused(images, monkeypatch):
    ranks = [open_source(str(path)).summary for path in (images, images, images / "train")]

    def gathered(world, value):
        return [(one.digest, one.train.images, one.held_out) for one in ranks[: world.size]]

    monkeypatch.setattr(introduction, "all_gather_object", gathered)
    check_ranks(ranks[0], World(0, 2, 0, 2))
    with pytest.raises(DataError, match=r"--data_path: rank 0 and rank 2 .*32 \+ 8 and 32 \+ 0"):
        check_ranks(ranks[0], World(0, 3, 0, 3))


@pytest.mark.parametrize(
    ("arch", "expected"), [("conv_small", {"patch_size", "num_heads", "drop_path_rate"}), ("vit_tiny", set())]
)
def test_settings_without_effect_are_named(arch, expected):
    values = {"patch_size": 16, "num_heads": 3, "drop_path_rate": 0.1}
    config = resolve("simclr", {"recipe": "cifar", "arch": arch, **values})
    lines = without_effect(config, create_backbone(arch))
    assert {line.partition(":")[0] for line in lines} == {f"--{name}" for name in expected}
    assert without_effect(resolve("simclr", {"recipe": "cifar"}), create_backbone("conv_small")) == []
