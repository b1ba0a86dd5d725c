"""Checkpoints: complete or absent, and read as tensors only; which one is found is in test_checkpoint_found.py."""

import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from fasttrain.checkpoint import store
from fasttrain.checkpoint.store import choose, find, publish, read_card, restore
from fasttrain.config.resolve import resolve
from fasttrain.distributed.world import World
from fasttrain.engine.build import build_method
from fasttrain.engine.engine import Engine
from fasttrain.errors import ConfigError, SaveError
from tests.checkpoints import CARD, state_of, train, write_card


def _steps(folder):
    return sorted(path.name for path in folder.iterdir())


def test_restores_weights_and_optimizer_to_the_last_bit(engine, tmp_path):
    train(engine, 2)
    before = state_of(engine)
    publish(engine, tmp_path, replace(CARD, step=2), keep=False)
    train(engine, 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
    assert restore(engine, find("auto", tmp_path), CARD) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_restores_the_shards_of_layerwise_optimizers_to_the_last_bit(optimizer, tmp_path):
    card = replace(CARD, optimizer=optimizer, zero_stage=2, step=2)
    values = {"recipe": "cifar", "batch_size_per_gpu": 4, "hidden_dim": 16, "out_dim": 8, "deterministic": True}
    config = resolve("simclr", {**values, "zero_stage": 2, "optimizer": optimizer})
    torch.manual_seed(0)
    engine = Engine(config, build_method(config, images=32, world_size=1), World.from_environment(), steps_per_epoch=4)
    train(engine, 2)
    publish(engine, tmp_path, card, keep=False)
    train(engine, 1)
    after = state_of(engine)
    assert restore(engine, find("auto", tmp_path), card) == 2
    assert any(not torch.equal(a, b) for a, b in zip(after, state_of(engine), strict=True))
    train(engine, 1)
    assert all(torch.equal(a, b) for a, b in zip(after, state_of(engine), strict=True))
    engine.close()


def test_the_newest_stays_and_those_to_be_kept(engine, tmp_path):
    for step, keep in ((1, False), (2, True), (3, False), (4, False)):
        publish(engine, tmp_path, replace(CARD, step=step), keep=keep)
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}"
    assert _steps(tmp_path) == ["latest", "step-00000002", "step-00000004"]
    assert read_card(find("auto", tmp_path)) == replace(CARD, step=4)


@pytest.mark.parametrize(("newest", "stay"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_so_many_of_the_newest_stay(tmp_path, newest, stay):
    for step in (1, 2, 3, 4, 5, 6):  # 6 is of a run that was taken up again before it
        write_card(tmp_path, step, keep=step == 2)
    gone = store._superfluous(tmp_path, "step-00000005", newest)
    assert sorted({1, 2, 3, 4, 5, 6} - {int(path.name[5:]) for path in gone}) == stay


def test_a_step_can_be_published_again(engine, tmp_path):
    for version in ("old", "new"):
        publish(engine, tmp_path, replace(CARD, step=1, version=version), keep=False)
    assert read_card(tmp_path / "step-00000001").version == "new"


@contextmanager
def _files_of_at_most(size):
    """A disk that is full, for this process: no file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_full_disk_leaves_the_former_one_and_no_rubbish(engine, tmp_path, size):
    publish(engine, tmp_path, replace(CARD, step=1), keep=False)
    message = r"step-00000002 could not be written \(File too large: .*\.pt\); step-00000001 is the last complete one; "
    with _files_of_at_most(size), pytest.raises(SaveError, match=message):
        publish(engine, tmp_path, replace(CARD, step=2), keep=False)
    assert choose("auto", tmp_path, engine.world) == (tmp_path / "step-00000001", [])
    assert _steps(tmp_path) == ["latest", "step-00000001"]
    publish(engine, tmp_path, replace(CARD, step=3), keep=False)
    assert _steps(tmp_path) == ["latest", "step-00000003"]


def test_the_first_checkpoint_on_a_full_disk(engine, tmp_path):
    with _files_of_at_most(10), pytest.raises(SaveError, match="there is none before it"):
        publish(engine, tmp_path, replace(CARD, step=1), keep=False)
    assert find("auto", tmp_path) is None


def test_a_killed_writer_s_rubbish_is_cleared(engine, tmp_path):
    (tmp_path / ".step-00000001.part").mkdir()
    (tmp_path / ".step-00000001.part" / "half.pt").write_bytes(b"half")
    assert find("auto", tmp_path) is None
    publish(engine, tmp_path, replace(CARD, step=3), keep=False)
    assert _steps(tmp_path) == ["latest", "step-00000003"]


def test_a_step_that_is_published_again_is_never_absent(engine, tmp_path, monkeypatch):
    """It was removed first, and what came between left neither the old one nor the new one."""
    publish(engine, tmp_path, replace(CARD, step=1, version="old"), keep=False)
    removed = []
    monkeypatch.setattr(store.shutil, "rmtree", lambda path, **_: removed.append((path.name, _versions(tmp_path))))
    publish(engine, tmp_path, replace(CARD, step=1, version="new"), keep=False)
    assert removed == [(".step-00000001.old.part", ["new"])]


def _versions(folder):
    return [read_card(path).version for path in folder.glob("step-*")]


@pytest.mark.parametrize("left", [None, "", "[]", "{}"])
def test_a_half_removed_checkpoint_does_not_stop_the_run(engine, tmp_path, left):
    """A process killed while it removed an old checkpoint left a folder without a card, and the next one failed."""
    half = tmp_path / "step-00000001"
    half.mkdir()
    if left is not None:
        (half / "fasttrain.json").write_text(left)
    publish(engine, tmp_path, replace(CARD, step=2), keep=False)
    assert _steps(tmp_path) == ["latest", "step-00000002"]


def test_code_in_the_optimizer_s_shard_is_refused(tmp_path):
    """ZeRO's shards are files of their own."""
    config = resolve("simclr", {"recipe": "cifar", "batch_size_per_gpu": 4, "hidden_dim": 16, "zero_stage": 2})
    engine = Engine(config, build_method(config, images=32, world_size=1), World.from_environment(), steps_per_epoch=4)
    card = replace(CARD, zero_stage=2, step=1)
    publish(engine, tmp_path, card, keep=False)
    assert restore(engine, tmp_path / "step-00000001", card) == 1
    (shard,) = tmp_path.glob("step-*/*optim_states.pt")
    marker = tmp_path / "marker"
    torch.save({"optimizer_state_dict": _Touches(marker)}, shard)
    with pytest.raises(ConfigError, match=r"holds more than tensors \(.*Touches|holds more than tensors \(.*open"):
        restore(engine, shard.parent, card)
    engine.close()
    assert not marker.exists()
    torch.load(shard, weights_only=False)
    assert marker.exists()


class _Touches:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_deepspeed_and_other_readers_are_left_as_they_were(engine, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    publish(engine, tmp_path, replace(CARD, step=1), keep=False)
    restore(engine, tmp_path / "step-00000001", CARD)
    assert "save" not in vars(engine.deepspeed.checkpoint_engine)
    assert "_copy_recovery_script" not in vars(engine.deepspeed)
    assert set(torch.serialization.get_safe_globals()) == before
