"""Checkpoints are complete or absent, verified before use, and read as tensors only."""

import json
import re
import shutil
import threading
import zlib
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fasttrain.checkpoint import store
from fasttrain.checkpoint.card import find, read_card
from fasttrain.checkpoint.store import Publisher, choose, restore
from fasttrain.distributed.world import World
from fasttrain.errors import ConfigError, SaveError
from tests.checkpoints import CARD, largest_file, publish, same, small_engine, state_of, train, write_card

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


@contextmanager
def _blocked_writes(monkeypatch):
    """Yield an event. Checkpoints are written only once it is set."""
    released, write = threading.Event(), store.write_tensors

    def write_later(path, content):
        assert released.wait(60)
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_tensors", write_later)
        yield released
        released.set()


def test_training_continues_while_a_checkpoint_is_written(engine, tmp_path, monkeypatch):
    """The published state is the one at the copy, and the next checkpoint waits for the one before."""
    publisher, card = Publisher(engine, tmp_path, newest=9, note=print), replace(CARD, step=1)
    train(engine, [0])
    with _blocked_writes(monkeypatch) as released:
        publisher.publish(card, keep=False)
        before = state_of(engine)
        train(engine, [1])
        after = state_of(engine)
        publisher.check(2)  # still being written
        assert [path.name for path in tmp_path.iterdir()] in ([], [".step-00000001.part"])
        threading.Timer(0.2, released.set).start()
        publisher.publish(replace(card, step=2), keep=False)
        assert (tmp_path / "step-00000001").is_dir()
        publisher.wait()
    assert not same(before, after)
    for step, state in ((1, before), (2, after)):
        restore(engine, tmp_path / f"step-{step:08d}", CARD)
        assert same(state_of(engine), state), step


def test_error_of_a_background_write_is_raised_at_a_later_step(engine, tmp_path, monkeypatch):
    """The ranks look 1, 2, 4, 8, ... steps after the copy."""
    publisher = Publisher(engine, tmp_path, newest=None, note=print)
    monkeypatch.setattr(store, "write_tensors", _fail)
    publisher.publish(replace(CARD, step=5), keep=False)
    publisher._thread.join()
    publisher.check(8)
    with pytest.raises(SaveError, match=r"step-00000005: .*\(a full disk: file\); there is none before it"):
        publisher.check(9)
    publisher.check(10)
    publisher.wait()
    assert _steps(tmp_path) == []


def _fail(*_):
    raise OSError(28, "a full disk", "file")


def test_without_room_for_a_copy_the_training_waits(engine, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(store, "available_memory", lambda: 1000)
    monkeypatch.setattr(store.HostCopy, "fill", lambda *_: pytest.fail("the state was copied"))
    publisher = Publisher(engine, tmp_path, newest=None, note=lines.append)
    for step in (1, 2):
        publisher.publish(replace(CARD, step=step), keep=False)
        assert _steps(tmp_path) == ["latest", f"step-{step:08d}"]
        publisher.check(step + 1)
    assert ["checkpoints: the training waits" in line for line in lines] == [True]


def test_stage_2_stores_the_teacher_once(tmp_path, monkeypatch):
    """On a GPU, DeepSpeed copies every parameter that is not trained to the host, and stored it twice."""
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    sizes = {}
    for stage in (1, 2):
        with small_engine("byol", zero_stage=stage, hidden_dim=16, out_dim=8) as engine:
            publish(engine, tmp_path / str(stage), replace(CARD, step=1), keep=False)
            sizes[stage] = (tmp_path / str(stage) / "step-00000001" / _MODEL).stat().st_size
            teacher = sum(p.numel() * 4 for p in engine.method.teacher.parameters())
    assert sizes[2] - sizes[1] < teacher / 2


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
