"""Checkpoints: complete or absent, found, checked, and read as tensors only."""

import json
import re
import resource
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch

from fasttrain import checkpoint
from fasttrain.build import build_method
from fasttrain.checkpoint import Card, SaveError, choose, find, publish, read_card, restore
from fasttrain.config import ConfigError, resolve
from fasttrain.distributed import World, initialise, world_from_environment
from fasttrain.engine import Engine
from fasttrain.pipelines import Batch

_CARD = Card("simclr", False, "conv_small", "adamw", 0, 1, 0, "0")


@pytest.fixture(scope="module")
def engine():
    world = world_from_environment()
    initialise(world)
    config = resolve("simclr", {"recipe": "cifar", "batch_size_per_gpu": 4, "hidden_dim": 16, "out_dim": 8})
    made = Engine(config, build_method(config, images=32, world_size=1), world, steps_per_epoch=4)
    yield made
    made.close()


def _train(engine, steps):
    generator = torch.Generator().manual_seed(0)
    for index in range(steps):
        step = engine.step_at(index, measure=False)
        views = torch.randn(2, 4, 3, 32, 32, generator=generator)
        engine.micro_step(Batch((views,), None, torch.arange(4)), step)
        engine.update(step)


def _state(engine):
    """Weights, and what the optimizer keeps of every parameter."""
    moments = engine.optimizer.state.values()
    found = list(engine.method.state_dict().values()) + [value for one in moments for value in one.values()]
    return [torch.as_tensor(value).clone() for value in found]


def _steps(folder):
    return sorted(path.name for path in folder.iterdir())


def _card(folder, step, **changes):
    """A checkpoint folder with a card and nothing else."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "fasttrain.json").write_text(json.dumps({**asdict(replace(_CARD, step=step)), "keep": False, **changes}))
    return path


def test_restores_weights_and_optimizer_to_the_last_bit(engine, tmp_path):
    _train(engine, 2)
    before = _state(engine)
    publish(engine, tmp_path, replace(_CARD, step=2), keep=False)
    _train(engine, 1)
    assert any(not torch.equal(a, b) for a, b in zip(before, _state(engine), strict=True))
    assert restore(engine, find("auto", tmp_path), _CARD) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, _state(engine), strict=True))


@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
def test_restores_the_shards_of_layerwise_optimizers_to_the_last_bit(optimizer, tmp_path):
    card = replace(_CARD, optimizer=optimizer, zero_stage=2, step=2)
    values = {"recipe": "cifar", "batch_size_per_gpu": 4, "hidden_dim": 16, "out_dim": 8, "deterministic": True}
    config = resolve("simclr", {**values, "zero_stage": 2, "optimizer": optimizer})
    torch.manual_seed(0)
    engine = Engine(config, build_method(config, images=32, world_size=1), world_from_environment(), steps_per_epoch=4)
    _train(engine, 2)
    publish(engine, tmp_path, card, keep=False)
    _train(engine, 1)
    after = _state(engine)
    assert restore(engine, find("auto", tmp_path), card) == 2
    assert any(not torch.equal(a, b) for a, b in zip(after, _state(engine), strict=True))
    _train(engine, 1)
    assert all(torch.equal(a, b) for a, b in zip(after, _state(engine), strict=True))
    engine.close()


def test_the_newest_stays_and_those_to_be_kept(engine, tmp_path):
    for step, keep in ((1, False), (2, True), (3, False), (4, False)):
        publish(engine, tmp_path, replace(_CARD, step=step), keep=keep)
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}"
    assert _steps(tmp_path) == ["latest", "step-00000002", "step-00000004"]
    assert read_card(find("auto", tmp_path)) == replace(_CARD, step=4)


@pytest.mark.parametrize(("newest", "stay"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_so_many_of_the_newest_stay(tmp_path, newest, stay):
    for step in (1, 2, 3, 4, 5, 6):  # 6 is of a run that was taken up again before it
        _card(tmp_path, step, keep=step == 2)
    gone = checkpoint._superfluous(tmp_path, "step-00000005", newest)
    assert sorted({1, 2, 3, 4, 5, 6} - {int(path.name[5:]) for path in gone}) == stay


def test_a_step_can_be_published_again(engine, tmp_path):
    for version in ("old", "new"):
        publish(engine, tmp_path, replace(_CARD, step=1, version=version), keep=False)
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
    publish(engine, tmp_path, replace(_CARD, step=1), keep=False)
    message = r"step-00000002 could not be written \(File too large: .*\.pt\); step-00000001 is the last complete one; "
    with _files_of_at_most(size), pytest.raises(SaveError, match=message):
        publish(engine, tmp_path, replace(_CARD, step=2), keep=False)
    assert choose("auto", tmp_path, engine.world) == (tmp_path / "step-00000001", [])
    assert _steps(tmp_path) == ["latest", "step-00000001"]
    publish(engine, tmp_path, replace(_CARD, step=3), keep=False)
    assert _steps(tmp_path) == ["latest", "step-00000003"]


def test_the_first_checkpoint_on_a_full_disk(engine, tmp_path):
    with _files_of_at_most(10), pytest.raises(SaveError, match="there is none before it"):
        publish(engine, tmp_path, replace(_CARD, step=1), keep=False)
    assert find("auto", tmp_path) is None


def test_a_killed_writer_s_rubbish_is_cleared(engine, tmp_path):
    (tmp_path / ".step-00000001.part").mkdir()
    (tmp_path / ".step-00000001.part" / "half.pt").write_bytes(b"half")
    assert find("auto", tmp_path) is None
    publish(engine, tmp_path, replace(_CARD, step=3), keep=False)
    assert _steps(tmp_path) == ["latest", "step-00000003"]


def test_a_step_that_is_published_again_is_never_absent(engine, tmp_path, monkeypatch):
    """It was removed first, and what came between left neither the old one nor the new one."""
    publish(engine, tmp_path, replace(_CARD, step=1, version="old"), keep=False)
    removed = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: removed.append((path.name, _versions(tmp_path))))
    publish(engine, tmp_path, replace(_CARD, step=1, version="new"), keep=False)
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
    publish(engine, tmp_path, replace(_CARD, step=2), keep=False)
    assert _steps(tmp_path) == ["latest", "step-00000002"]


def test_code_in_the_optimizer_s_shard_is_refused(tmp_path):
    """ZeRO's shards are files of their own."""
    config = resolve("simclr", {"recipe": "cifar", "batch_size_per_gpu": 4, "hidden_dim": 16, "zero_stage": 2})
    engine = Engine(config, build_method(config, images=32, world_size=1), world_from_environment(), steps_per_epoch=4)
    card = replace(_CARD, zero_stage=2, step=1)
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
    publish(engine, tmp_path, replace(_CARD, step=1), keep=False)
    restore(engine, tmp_path / "step-00000001", _CARD)
    assert "save" not in vars(engine.deepspeed.checkpoint_engine)
    assert "_copy_recovery_script" not in vars(engine.deepspeed)
    assert set(torch.serialization.get_safe_globals()) == before


def test_finds_a_run_its_checkpoints_folder_and_a_checkpoint(tmp_path):
    old, new = _card(tmp_path / "checkpoints", 1), _card(tmp_path / "checkpoints", 2)
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
        publish(engine, tmp_path, replace(_CARD, step=step), keep=True)
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
    publish(engine, tmp_path, replace(_CARD, step=1), keep=False)
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
        _card(tmp_path, step)
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
        publish(engine, tmp_path, replace(_CARD, step=step), keep=True)
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
    publish(engine, tmp_path, replace(_CARD, step=2), keep=False)
    path = tmp_path / "step-00000002"
    card = json.loads((path / "fasttrain.json").read_text())
    for name in ("files", "batch", "origin", "crc32"):
        del card[name]
    (path / "fasttrain.json").write_text(json.dumps(card))
    states = torch.load(path / "mp_rank_00_model_states.pt", weights_only=True)
    del states["trained"], states["grad_scaler"]
    torch.save(states, path / "mp_rank_00_model_states.pt")
    before = _state(engine)
    _train(engine, 1)
    assert choose("auto", tmp_path, engine.world) == (path, [])
    assert restore(engine, path, _CARD) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, _state(engine), strict=True))


def test_what_is_other_than_before_is_said():
    now = replace(_CARD, batch=64)
    assert checkpoint.changes(_CARD, now) == checkpoint.changes(now, now) == []
    (line,) = checkpoint.changes(replace(now, world_size=2, zero_stage=3), now)
    assert line == "the checkpoint is of 2 rank(s) at ZeRO 3, and was cut anew for 1 rank(s) at ZeRO 0"
    (line,) = checkpoint.changes(replace(now, batch=128), now)
    assert line.startswith("a step has 64 images now, 128 in the checkpoint: ")


@pytest.mark.parametrize("given", ["", "missing"])
def test_a_path_without_a_checkpoint_is_an_error(tmp_path, given):
    with pytest.raises(ConfigError, match="no checkpoint there; pass a run's folder"):
        find(str(tmp_path / given), tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"method": "simclr"}', None])
def test_a_card_that_cannot_be_read_is_an_error(tmp_path, content):
    path = _card(tmp_path, 1)
    if content is None:
        (path / "fasttrain.json").unlink()
    else:
        (path / "fasttrain.json").write_text(content)
    with pytest.raises(ConfigError, match=r"has no readable fasttrain.json \(.*\); choose another or --resume never"):
        read_card(path)


def test_a_card_of_a_later_version_is_read(tmp_path):
    assert read_card(_card(tmp_path, 5, something_new=[1])) == replace(_CARD, step=5)


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
    path = _card(tmp_path, 1, **{field: value})
    with pytest.raises(ConfigError, match=rf"step-00000001 is of {field} {value!r}, this run of "):
        checkpoint.check(path, _CARD)
    before = _state(engine)
    with pytest.raises(ConfigError, match="--resume never"):
        restore(engine, path, _CARD)
    assert all(torch.equal(a, b) for a, b in zip(before, _state(engine), strict=True))


def test_step_and_version_may_differ(tmp_path):
    assert checkpoint.check(_card(tmp_path, 9, version="9.9"), _CARD).step == 9
