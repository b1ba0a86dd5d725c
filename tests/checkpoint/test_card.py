"""A checkpoint's card: what it refuses, what it reports, and which checkpoint of a run is the newest."""

import re
import shutil
from dataclasses import replace

import pytest

from fasttrain.checkpoint.card import ahead_of, changes, check, find, newest, read_card
from fasttrain.checkpoint.store import choose
from fasttrain.distributed.world import World
from fasttrain.errors import ConfigError
from tests.checkpoints import CARD, publish, write_card


def test_find_and_newest_follow_latest(tmp_path):
    folder = tmp_path / "checkpoints"
    old, new = write_card(folder, 1), write_card(folder, 2)
    (folder / "step-00000003").mkdir()  # without a card
    assert find("auto", tmp_path) == newest(tmp_path) == new  # killed before it wrote latest
    (folder / "latest").write_text("step-00000001\n")
    for path in (tmp_path, folder, old):
        assert find(str(path), tmp_path / "elsewhere") == newest(path) == old
    assert find(str(new), tmp_path) == newest(new) == new
    (folder / "latest").write_bytes(b"step-\xff\0")
    assert newest(tmp_path) == new
    assert find("never", tmp_path) is None
    assert find("auto", tmp_path / "elsewhere") is None


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_path_without_a_checkpoint_is_refused(tmp_path, name):
    (tmp_path / "checkpoints" / ".step-00000002.part").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--resume: no checkpoint"):
        find(str(tmp_path / name), tmp_path)
    with pytest.raises(ConfigError, match=r"no complete checkpoint.*--saveckp_freq_steps"):
        newest(tmp_path / name)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"method": "simclr"}', None])
def test_an_unreadable_card_is_refused(tmp_path, content):
    path = write_card(tmp_path, 1)
    (path / "fasttrain.json").unlink() if content is None else (path / "fasttrain.json").write_text(content)
    with pytest.raises(ConfigError, match=r"no readable fasttrain.json"):
        read_card(path)


@pytest.mark.parametrize("name", ["step", "rollbacks", "version", "files"])
def test_a_wrong_digit_in_a_card_is_found(engine, tmp_path, name):
    """Another step would change the schedules, and nothing else would notice."""
    publish(engine, tmp_path, replace(CARD, step=1), keep=False)
    path = tmp_path / "step-00000001" / "fasttrain.json"
    text = path.read_text()
    position = re.compile(r"\d").search(text, text.index(f'"{name}"')).start()
    path.write_text(text[:position] + str((int(text[position]) + 1) % 10) + text[position + 1 :])
    with pytest.raises(ConfigError, match="its checksum differs"):
        read_card(path.parent)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("world_size", 10**8, "names 100,000,000 ranks"),
        ("world_size", "2", "its world_size is no"),
        ("zero_stage", -1, "its zero_stage is no"),
    ],
)
def test_a_card_with_impossible_numbers_is_refused(tmp_path, field, value, problem):
    """A card of 10^8 ranks took a minute before it was refused."""
    path = write_card(tmp_path, 1, **{"zero_stage": 3, "world_size": 1, field: value})
    with pytest.raises(ConfigError, match=problem):
        read_card(path)


def test_a_card_of_a_later_format_is_refused(tmp_path):
    """It is not corrupt, so --resume auto must not pass it over for an older checkpoint."""
    write_card(tmp_path / "checkpoints", 1)
    path = write_card(tmp_path / "checkpoints", 2, format=2, version="9.0")
    for read in (lambda: read_card(path), lambda: choose("auto", tmp_path, World(0, 1, 0, 1))):
        with pytest.raises(ConfigError, match=r"step-00000002: .*format 2.*9\.0"):
            read()


def test_a_folder_with_another_name_is_no_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(write_card(folder, 1), folder / "step-00000012-good")
    assert newest(tmp_path).name == "step-00000001"


def test_a_card_of_a_later_version_is_read(tmp_path):
    assert read_card(write_card(tmp_path, 5, something_new=[1])) == replace(CARD, step=5)


@pytest.mark.parametrize(
    ("field", "value"), [("method", "dino"), ("entropy", True), ("arch", "resnet18"), ("optimizer", "sgd")]
)
def test_a_card_of_another_run_is_refused(tmp_path, field, value):
    path = write_card(tmp_path, 1, **{field: value})
    with pytest.raises(ConfigError, match=rf"step-00000001: .* {field} {value!r}, .*--resume never"):
        check(path, CARD)
    assert check(write_card(tmp_path, 9, version="9.9"), CARD).step == 9


@pytest.mark.parametrize(
    ("step", "before", "now", "ahead"),
    [(7, 5, 7, 3), (7, 7, 5, -2), (10, 5, 7, 4), (10, 5, 5, 0), (7, None, 5, 0)],
)
def test_the_epoch_does_not_jump_back(step, before, now, ahead):
    card = replace(CARD, step=step, steps_per_epoch=before)
    assert ahead_of(card, now) == ahead
    later = replace(card, step=step + 1, steps_per_epoch=now, ahead=ahead)
    assert ahead_of(later, now) == ahead
    if before:
        assert step / before <= (step + ahead) / now < step / before + 1 / now


def test_changes_of_ranks_and_batch_are_reported():
    now = replace(CARD, batch=64)
    assert changes(CARD, now) == changes(now, now) == []
    assert changes(replace(now, world_size=2, zero_stage=3), now) == [
        "resharded the checkpoint from 2 ranks (ZeRO 3) to 1 rank (ZeRO 0)"
    ]
    known = replace(now, images=50, data="a")
    assert changes(known, known) == []
    for other, expected in ((replace(known, images=60, data="b"), "60 in"), (replace(known, data="b"), "others")):
        (line,) = changes(other, known)
        assert expected in line
    (line,) = changes(replace(now, batch=128), now)
    assert re.match("a step has 64 images, 128 in the checkpoint", line)
