"""Which checkpoint a run goes on from: found, checked, and a broken one passed over."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from fasttrain.checkpoint import store
from fasttrain.checkpoint.store import choose, find, publish, read_card, restore
from fasttrain.distributed.world import World
from fasttrain.errors import ConfigError
from tests.checkpoints import CARD, state_of, train, write_card


def test_finds_a_run_its_checkpoints_folder_and_a_checkpoint(tmp_path):
    old, new = write_card(tmp_path / "checkpoints", 1), write_card(tmp_path / "checkpoints", 2)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")  # it decides, not the number
    for given in (tmp_path, tmp_path / "checkpoints", old):
        assert find(str(given), tmp_path / "elsewhere") == old
    assert find(str(new), tmp_path) == new
    assert find("auto", tmp_path) == old
    assert find("never", tmp_path) is None
    assert find("auto", tmp_path / "elsewhere") is None


def test_a_latest_that_names_nothing_is_an_error(tmp_path):
    (tmp_path / "latest").write_text("step-00000007")
    with pytest.raises(ConfigError, match="step-00000007 is broken: it is not there; choose another or --resume never"):
        choose("auto", tmp_path, World(0, 1, 0, 1))


@pytest.mark.parametrize("content", [b"", b"rtep-00000001", b"step-00000009", b"step-00000000", b"\xff\0", b"../x\ny"])
def test_a_latest_that_is_broken_leaves_the_newest_complete_one(engine, tmp_path, content):
    """One wrong bit in it had a run refused whose checkpoints were whole; a byte that is no text was an error."""
    for step in (1, 2):
        publish(engine, tmp_path, replace(CARD, step=step), keep=True)
    (tmp_path / "latest").write_bytes(content)
    found, (line,) = choose("auto", tmp_path, engine.world)
    assert found == tmp_path / "step-00000002"
    assert re.fullmatch(r"checkpoint .* is broken: it (is not there|names no .*); going on from step-00000002", line), (
        line
    )
    with pytest.raises(ConfigError, match="is broken: it "):
        choose(str(tmp_path), tmp_path, engine.world)


@pytest.mark.parametrize("name", ["step", "rollbacks", "version", "files"])
def test_a_wrong_digit_in_a_card_is_found(engine, tmp_path, name):
    """With another step the schedules would be others, and nothing else would notice."""
    publish(engine, tmp_path, replace(CARD, step=1), keep=False)
    path = tmp_path / "step-00000001" / "fasttrain.json"
    text = path.read_text()
    start = re.search(r"\d", text[text.index(f'"{name}"') :]).start() + text.index(f'"{name}"')
    path.write_text(text[:start] + str((int(text[start]) + 1) % 10) + text[start + 1 :])
    with pytest.raises(ConfigError, match=r"it has no readable fasttrain.json"):
        choose("auto", tmp_path, engine.world)
    with pytest.raises(ConfigError, match=r"no readable fasttrain.json \(its checksum differs\)"):
        read_card(path.parent)


def test_without_latest_the_newest_complete_one_is_meant(tmp_path):
    """A process killed between renaming the first checkpoint and naming it left a run that began anew."""
    for step in (1, 2):
        write_card(tmp_path, step)
    (tmp_path / "step-00000003").mkdir()
    assert find("auto", tmp_path).name == "step-00000002"


def _truncated(file):
    file.write_bytes(file.read_bytes()[:-1])


def _corrupted(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _without_card(file):
    (file.parent / "fasttrain.json").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_truncated, r"mp_rank_00_model_states.pt has [\d,]+ bytes, [\d,]+ were written"),
        (_corrupted, r"mp_rank_00_model_states.pt is not what was written \(its checksum differs\)"),
        (lambda file: file.unlink(), r"mp_rank_00_model_states.pt cannot be read \(No such file or directory\)"),
        (_without_card, "it has no readable fasttrain.json"),
        (lambda file: shutil.rmtree(file.parent), "it is not there"),
    ],
    ids=["truncated", "corrupted", "missing", "no card", "removed"],
)
def test_auto_passes_over_what_is_broken_and_says_so(engine, tmp_path, damage, problem):
    for step in (1, 2, 3, 4):
        publish(engine, tmp_path, replace(CARD, step=step), keep=True)
    broken, whole = tmp_path / "step-00000004", tmp_path / "step-00000002"
    _corrupted(tmp_path / "step-00000003" / "mp_rank_00_model_states.pt")
    damage(broken / "mp_rank_00_model_states.pt")
    found, (first, second) = choose("auto", tmp_path, engine.world)
    assert found == whole
    assert re.fullmatch(f"checkpoint {broken} is broken: {problem}; going on from step-00000002", first), first
    assert "step-00000003 is broken" in second
    with pytest.raises(ConfigError, match=f"step-00000004 is broken: {problem}; choose another or"):
        choose(str(tmp_path), tmp_path, engine.world)
    shutil.rmtree(whole)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(ConfigError, match=f"step-00000004 is broken: {problem}; choose another or --resume never"):
        choose("auto", tmp_path, engine.world)


def test_a_checkpoint_of_an_earlier_version_is_read(engine, tmp_path):
    """Without sums of its files, the trained parameters' names and the batch."""
    publish(engine, tmp_path, replace(CARD, step=2), keep=False)
    path = tmp_path / "step-00000002"
    card = json.loads((path / "fasttrain.json").read_text())
    for name in ("files", "batch", "origin", "crc32"):
        del card[name]
    (path / "fasttrain.json").write_text(json.dumps(card))
    states = torch.load(path / "mp_rank_00_model_states.pt", weights_only=True)
    del states["trained"], states["grad_scaler"]
    torch.save(states, path / "mp_rank_00_model_states.pt")
    before = state_of(engine)
    train(engine, 1)
    assert choose("auto", tmp_path, engine.world) == (path, [])
    assert restore(engine, path, CARD) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))


def test_what_is_other_than_before_is_said():
    now = replace(CARD, batch=64)
    assert store.changes(CARD, now) == store.changes(now, now) == []
    (line,) = store.changes(replace(now, world_size=2, zero_stage=3), now)
    assert line == "the checkpoint is of 2 rank(s) at ZeRO 3, and was cut anew for 1 rank(s) at ZeRO 0"
    (line,) = store.changes(replace(now, batch=128), now)
    assert line.startswith("a step has 64 images now, 128 in the checkpoint: ")


@pytest.mark.parametrize("given", ["", "missing"])
def test_a_path_without_a_checkpoint_is_an_error(tmp_path, given):
    with pytest.raises(ConfigError, match="no checkpoint there; pass a run's folder"):
        find(str(tmp_path / given), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"method": "simclr"}', None])
def test_a_card_that_cannot_be_read_is_an_error(tmp_path, content):
    path = write_card(tmp_path, 1)
    if content is None:
        (path / "fasttrain.json").unlink()
    else:
        (path / "fasttrain.json").write_text(content)
    with pytest.raises(ConfigError, match=r"has no readable fasttrain.json \(.*\); choose another or --resume never"):
        read_card(path)


def test_a_card_of_a_later_version_is_read(tmp_path):
    assert read_card(write_card(tmp_path, 5, something_new=[1])) == replace(CARD, step=5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "dino"),
        ("entropy", True),
        ("arch", "resnet18"),
        ("optimizer", "sgd"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_loaded(engine, tmp_path, field, value):
    path = write_card(tmp_path, 1, **{field: value})
    with pytest.raises(ConfigError, match=rf"step-00000001 is of {field} {value!r}, this run of "):
        store.check(path, CARD)
    before = state_of(engine)
    with pytest.raises(ConfigError, match="--resume never"):
        restore(engine, path, CARD)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))


def test_step_and_version_may_differ(tmp_path):
    assert store.check(write_card(tmp_path, 9, version="9.9"), CARD).step == 9
