"""A checkpoint's card: what it refuses, what it reports, and which checkpoint of a run is the newest."""

import re
from dataclasses import replace

import pytest

from fasttrain.checkpoint.card import changes, check, find, newest, read_card
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
