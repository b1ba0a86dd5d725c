"""Checkpoints are complete or absent, verified before use, and read as tensors only."""

import json
import re
import shutil
import zlib
from dataclasses import replace

import pytest
import torch

from fasttrain.checkpoint import store
from fasttrain.checkpoint.card import find, read_card
from fasttrain.checkpoint.store import choose, publish, restore
from fasttrain.distributed.world import World
from fasttrain.errors import ConfigError, SaveError
from tests.checkpoints import CARD, largest_file, same, state_of, train, write_card

_MODEL = "mp_rank_00_model_states.pt"


def _steps(folder):
    return sorted(path.name for path in folder.iterdir())


def _publish(engine, folder, *steps, **options):
    for step in steps:
        publish(engine, folder, replace(CARD, step=step), **{"keep": True, **options})


def test_the_newest_and_the_kept_checkpoints_stay(engine, tmp_path):
    for step, keep in ((1, False), (2, True), (3, False), (4, False)):
        _publish(engine, tmp_path, step, keep=keep)
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}"
    assert _steps(tmp_path) == ["latest", "step-00000002", "step-00000004"]
    assert read_card(find("auto", tmp_path)) == replace(CARD, step=4)


@pytest.mark.parametrize(("newest", "stay"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_n_stay(tmp_path, newest, stay):
    for step in (1, 2, 3, 4, 5, 6):  # step 6 is of a run that was resumed from an earlier one
        write_card(tmp_path, step, keep=step == 2)
    removed = store._superfluous(tmp_path, "step-00000005", newest)
    assert sorted({1, 2, 3, 4, 5, 6} - {int(path.name[5:]) for path in removed}) == stay


def test_a_step_published_again_is_never_absent(engine, tmp_path, monkeypatch):
    """It was removed first. A kill in between left neither the old nor the new checkpoint."""
    publish(engine, tmp_path, replace(CARD, step=1, version="old"), keep=False)
    removed, versions = [], lambda: [read_card(path).version for path in tmp_path.glob("step-*")]
    monkeypatch.setattr(store.shutil, "rmtree", lambda path, **_: removed.append((path.name, versions())))
    publish(engine, tmp_path, replace(CARD, step=1, version="new"), keep=False)
    assert removed == [(".step-00000001.old.part", ["new"])]


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_full_disk_leaves_the_former_checkpoint_only(engine, tmp_path, size):
    with largest_file(size), pytest.raises(SaveError, match="there is none before it"):
        _publish(engine, tmp_path, 1)
    assert find("auto", tmp_path) is None
    _publish(engine, tmp_path, 1)
    message = r"step-00000002: .*\(File too large: .*\.pt\); step-00000001 is the last complete one"
    with largest_file(size), pytest.raises(SaveError, match=message):
        _publish(engine, tmp_path, 2)
    assert choose("auto", tmp_path, engine.world) == (tmp_path / "step-00000001", [])
    assert _steps(tmp_path) == ["latest", "step-00000001"]


def test_leftovers_of_killed_saves_and_removals_are_removed(engine, tmp_path):
    for name in (".step-00000001.part", ".step-00000001.old.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.pt").write_bytes(b"half")
    _publish(engine, tmp_path, 2, keep=False)
    assert _steps(tmp_path) == ["latest", "step-00000002"]


@pytest.mark.parametrize("newest", [None, 1])
def test_other_folders_are_never_removed(engine, tmp_path, newest):
    """A person's copy and notes were removed, because their names begin like a checkpoint's."""
    _publish(engine, tmp_path, 1, keep=False)
    for name in ("step-00000001-good", "step-00000001.bak"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    others = {".step-notes.part": "", "step-notes": None, "step-1": "{}", "step-00000000": "[]"}
    for name, card in others.items():
        (tmp_path / name).mkdir()
        if card is not None:
            (tmp_path / name / "fasttrain.json").write_text(card)
    _publish(engine, tmp_path, 2, keep=False, newest=newest)
    assert _steps(tmp_path) == sorted(["latest", "step-00000002", "step-00000001-good", "step-00000001.bak", *others])


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


_DAMAGES = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]), rf"{_MODEL} has [\d,]+ bytes"),
    "flipped bit": (_flip_a_bit, f"{_MODEL} is corrupt"),
    "swapped": (lambda file: torch.save(torch.load(file, weights_only=True) | {"dp_world_size": 2}, file), _MODEL),
    "missing": (lambda file: file.unlink(), f"{_MODEL} cannot be read"),
    "no card": (lambda file: (file.parent / "fasttrain.json").unlink(), "it has no readable fasttrain.json"),
    "removed": (lambda file: shutil.rmtree(file.parent), "it does not exist"),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_auto_skips_damaged_checkpoints_and_a_path_does_not(engine, tmp_path, damage):
    _publish(engine, tmp_path, 1, 2, 3, 4)
    change, problem = _DAMAGES[damage]
    broken, intact = tmp_path / "step-00000004", tmp_path / "step-00000002"
    _flip_a_bit(tmp_path / "step-00000003" / _MODEL)
    change(broken / _MODEL)
    path, (first, second) = choose("auto", tmp_path, engine.world)
    assert path == intact
    assert re.match(f"{broken}: .*corrupt: {problem}", first), first
    assert first.endswith("resuming from step-00000002")
    assert "step-00000003: the checkpoint is corrupt" in second
    shutil.rmtree(intact)
    shutil.rmtree(tmp_path / "step-00000001")
    for resume in ("auto", str(tmp_path)):
        with pytest.raises(ConfigError, match=f"step-00000004: .*corrupt: {problem}.*--resume never"):
            choose(resume, tmp_path, engine.world)


@pytest.mark.parametrize("content", [b"", b"step-00000009", b"step-00000000", b"\xff\0"])
def test_auto_skips_a_corrupt_latest(engine, tmp_path, content):
    """One wrong bit in it refused a run whose checkpoints were intact."""
    _publish(engine, tmp_path, 1, 2)
    (tmp_path / "latest").write_bytes(content)
    path, (line,) = choose("auto", tmp_path, engine.world)
    assert path == tmp_path / "step-00000002"
    assert re.search(r"is corrupt: it (does not exist|names no checkpoint); resuming from step-00000002", line), line
    with pytest.raises(ConfigError, match="is corrupt: it "):
        choose(str(tmp_path), tmp_path, engine.world)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "latest").write_bytes(content)
    with pytest.raises(ConfigError, match="--resume never"):
        choose("auto", tmp_path / "empty", World(0, 1, 0, 1))


@pytest.mark.parametrize("age", ["first version", "CRC-32 of files"])
def test_a_checkpoint_of_an_earlier_version_is_restored(engine, tmp_path, age):
    """First without fingerprints, names of trained parameters and the batch; then with [size, CRC-32] per file."""
    publish(engine, tmp_path, replace(CARD, step=2), keep=False)
    path, before = tmp_path / "step-00000002", state_of(engine)
    file = path / _MODEL
    card = json.loads((path / "fasttrain.json").read_text())
    if age == "first version":
        for name in ("files", "batch", "origin", "crc32"):
            del card[name]
        states = torch.load(file, weights_only=True)
        del states["trained"], states["grad_scaler"]
        torch.save(states, file)
    else:
        card["files"] = {_MODEL: [file.stat().st_size, f"{zlib.crc32(file.read_bytes()):08x}"]}
        del card["crc32"]
    (path / "fasttrain.json").write_text(json.dumps(card))
    train(engine, [0])
    assert choose("auto", tmp_path, engine.world) == (path, [])
    assert restore(engine, path, CARD) == 2
    assert same(before, state_of(engine))
    if age != "first version":
        _flip_a_bit(file)
        with pytest.raises(ConfigError, match=f"{_MODEL} is corrupt"):
            choose("auto", tmp_path, engine.world)


def test_deepspeed_and_torch_are_left_unchanged(engine, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    _publish(engine, tmp_path, 1)
    restore(engine, tmp_path / "step-00000001", CARD)
    assert "save" not in vars(engine.deepspeed.checkpoint_engine)
    assert "_copy_recovery_script" not in vars(engine.deepspeed)
    assert set(torch.serialization.get_safe_globals()) == before
