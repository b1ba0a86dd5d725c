"""Any stage reads the checkpoint of any stage, with every method and optimizer.

Other numbers of ranks are in tests/distributed/test_two_ranks.py. Here their shards are cut by hand.
"""

import json
import re
import shutil
from collections import deque
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import methods
from fasttrain.checkpoint import state
from fasttrain.checkpoint.card import newest
from fasttrain.checkpoint.state import misfit, read, trained_names, whole_tensors
from fasttrain.checkpoint.store import restore
from fasttrain.engine import zero_files
from fasttrain.engine.zero import gradient_scaler
from fasttrain.engine.zero_files import (
    contiguous_spans,
    model_files,
    optimizer_files,
    padded_spans,
    pickled_classes,
)
from fasttrain.errors import ConfigError
from fasttrain.files import load_tensors
from tests.checkpoints import card_of, publish, small_engine, train
from tests.methods.small import SMALL
from tests.small_runs import train_few_steps

_STEP = "step-00000001"
_TWO_SPLITS = {"moco": {"bn_splits": 2}, "infomin": {"bn_splits": 2}}


def _engine(method, stage, **values):
    shared = {"batch_size_per_gpu": 8, "epochs": 2, "zero_stage": stage, "warmup_epochs": 0}
    return small_engine(method, **{**shared, **SMALL.get(method, {}), **_TWO_SPLITS.get(method, {}), **values})


def _saved(engine, folder, method):
    """Publish a checkpoint and return its content, whole."""
    publish(engine, folder, card_of(engine, method), keep=False)
    saved = read(folder / _STEP, engine.stage, 1)
    return saved.whole() | {name: torch.as_tensor(value) for name, value in saved.counters.items()}


def _different(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]


_EVERY = [(name, 1 + number % 3) for number, name in enumerate(methods.names())]


@pytest.mark.parametrize(("method", "stage"), [*_EVERY, ("dino", 3), ("moco", 1)])
def test_every_method_resumes_to_the_last_bit(tmp_path, method, stage):
    """Each method at one sharded stage; stage 0 is in tests/training."""
    with _engine(method, stage) as engine:
        train(engine, [0])
        publish(engine, tmp_path / "half", card_of(engine, method), keep=False)
        results = []
        for name in ("straight", "resumed"):
            if name == "resumed":
                assert restore(engine, tmp_path / "half" / _STEP, card_of(engine, method)) == 1
            results.append((train(engine, [1]), _saved(engine, tmp_path / name, method)))
    (losses, straight), (again, resumed) = results
    assert again == losses
    assert len([name for name in straight if name.endswith("exp_avg")]) > 5
    assert _different(straight, resumed) == []


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
def test_every_stage_restores_the_checkpoint_of_another(tmp_path, optimizer):
    """Through all stages, in engines with other initial weights: nothing changes, and the next loss is the same."""
    values = {"optimizer": optimizer, "norm_last_layer": False, "use_bn_at_bottleneck": True}
    losses = []
    for former, stage in ((None, 3), (3, 1), (1, 0), (0, 2), (2, 3)):
        with _engine("dino", stage, seed=stage, **values) as engine:
            if former is None:
                train(engine, [0])
                expected = _saved(engine, tmp_path / "3", "dino")
            else:
                restore(engine, tmp_path / str(former) / _STEP, card_of(engine, "dino"))
                assert _different(_saved(engine, tmp_path / str(stage), "dino"), expected) == [], stage
            losses.append(train(engine, [1]))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses[:1]).expand(5, -1, -1))


def test_the_loss_scale_of_fp16_is_restored(tmp_path):
    """DeepSpeed does not save it. A resumed run began with 65536 again."""
    values = {"_growth_tracker": 7, "scale": 128.0}
    with _engine("simclr", 0, precision="fp16") as engine:
        scaler = gradient_scaler(engine.deepspeed)
        train(engine, [0])
        scaler.load_state_dict(scaler.state_dict() | values)
        publish(engine, tmp_path, card_of(engine), keep=False)
    with _engine("simclr", 0, precision="fp16") as engine:
        restore(engine, tmp_path / _STEP, card_of(engine))
        assert values.items() <= gradient_scaler(engine.deepspeed).state_dict().items()


def _without(named, prefix):
    """Return a mapping without its first name with a prefix."""
    first = next(name for name in named if name.startswith(prefix))
    return {name: value for name, value in named.items() if name != first}


def test_a_misfit_is_named_and_changes_nothing(tmp_path):
    with _engine("byol", 2) as engine:
        publish(engine, tmp_path / "byol", card_of(engine, "byol"), keep=False)
        saved = read(tmp_path / "byol" / _STEP, 2, 1, trained_names(engine))
        assert misfit(saved, engine) is None
        more = {**saved.shapes, "student.more": torch.Size([2])}
        for changes, reason in (
            ({"shapes": _without(saved.shapes, "student.backbone")}, "it has no student.backbone"),
            ({"shapes": more}, "it has student.more"),
            ({"moments": _without(saved.moments, "student.head")}, "student.head.* is trained only"),
        ):
            assert re.match(reason, misfit(replace(saved, **changes), engine))
    for values, reason in (({"out_dim": 16}, "size mismatch for student.head.3.weight"), ({"arch": "test_resnet"}, "")):
        with _engine("byol", 0, **values) as other:
            before = _saved(other, tmp_path / "before", "byol")
            with pytest.raises(ConfigError, match=f"does not fit these settings .*{reason}.*--resume never"):
                restore(other, tmp_path / "byol" / _STEP, card_of(other, "byol"))
            assert _different(before, _saved(other, tmp_path / "after", "byol")) == []


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 3), st.data())
def test_any_range_of_a_parameter_is_read_from_any_shards(sizes, ranks, padding, data):
    names = [f"p{number}" for number in range(len(sizes))]
    tensors = [torch.arange(size) + 100 * number for number, size in enumerate(sizes, 1)]
    flat = torch.cat(tensors)
    shard = -(-(len(flat) + padding) // ranks)  # DeepSpeed stores no padding, so the last ones may be short or empty
    contiguous = [flat[rank * shard : (rank + 1) * shard].clone() for rank in range(ranks)]
    parts = [-(-size // ranks) for size in sizes]
    padded = [torch.cat([t, t.new_zeros(p * ranks - len(t))]).split(p) for t, p in zip(tensors, parts, strict=True)]
    padded = [torch.cat([p[rank] for p in padded]) for rank in range(ranks)]
    named = dict(zip(names, sizes, strict=True))
    spans_of = contiguous_spans(named, shard, ranks), padded_spans(named, ranks)
    for spans, shards in zip(spans_of, (contiguous, padded), strict=True):
        for name, tensor in zip(names, tensors, strict=True):
            start = data.draw(st.integers(0, len(tensor)))
            numel = data.draw(st.integers(0, len(tensor) - start))
            elements = state._narrow(state._cut(shards.__getitem__, spans[name]), start, numel)
            assert torch.equal(elements, tensor[start : start + numel])


@pytest.mark.parametrize("stage", [2, 3])
def test_rank_opens_only_the_files_that_it_needs(tmp_path, monkeypatch, stage):
    """Every rank opened the files of all ranks: 512 ranks made half a million opens."""
    with _engine("byol", stage) as engine:
        publish(engine, tmp_path, card_of(engine, "byol"), keep=False)
        folder, ranks = tmp_path / _STEP, 4
        for names in (model_files(stage, ranks), optimizer_files(stage, ranks)):
            for name in names[1:]:
                shutil.copy(folder / names[0], folder / name)
        opened = []
        for kind in (zero_files.ModelFile, zero_files.OptimizerFile):
            monkeypatch.setattr(kind, "load", _noted(kind.load, opened))
        saved = read(folder, stage, ranks, trained_names(engine))
        assert opened == [name[0] for name in (model_files(stage, ranks), optimizer_files(stage, ranks))]
        name, numel = max(((n, s.numel()) for n, s in saved.shapes.items() if n in saved.moments), key=lambda x: x[1])
        last = -(-numel // ranks) * 3 if stage == 3 else sum(part.numel for part in saved.weights[name][:3])
        deque(state._overlaps(saved.weights[name], last, numel - last), maxlen=0)
        assert len(opened) <= 3


def _noted(load, opened):
    def noted_load(path, *arguments):
        opened.append(path.name)
        return load(path, *arguments)

    return noted_load


def test_deepspeeds_universal_converter_accepts_the_checkpoint(tmp_path):
    from deepspeed.checkpoint import DeepSpeedCheckpoint

    with _engine("simclr", 1) as engine:
        publish(engine, tmp_path, card_of(engine), keep=False)
    states = load_tensors(tmp_path / _STEP / "mp_rank_00_model_states.pt", pickled_classes())
    assert states["universal_checkpoint_info"]["universal_checkpoint_version"] >= 0.2
    assert DeepSpeedCheckpoint(str(tmp_path / _STEP)).get_checkpoint_info("universal_checkpoint_info")


@pytest.fixture(scope="module")
def sharded(images, tmp_path_factory):
    """The run of ``simclr_run`` at stage 3."""
    return train_few_steps(images, tmp_path_factory.mktemp("sharded") / "run", "--zero_stage", 3)


def test_whole_tensors_of_stage_3_have_tied_parameters(sharded, tmp_path):
    folder = shutil.copytree(newest(sharded), tmp_path / "tied")
    _forget_fingerprints(folder)
    path = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    content = load_tensors(path, pickled_classes())
    stored = next(name for name in content["param_shapes"][0])
    torch.save(content | {"shared_params": {"tied.weight": stored}}, tmp_path / "changed.pt")
    (tmp_path / "changed.pt").rename(path)
    tensors = whole_tensors(folder)
    assert torch.equal(tensors["tied.weight"], tensors[stored])


def _forget_fingerprints(folder):
    """Damage then shows only when a file is opened, as in checkpoints of the first version."""
    card = json.loads((folder / "fasttrain.json").read_text())
    (folder / "fasttrain.json").write_text(json.dumps({k: v for k, v in card.items() if k not in ("files", "crc32")}))


def test_whole_tensors_name_missing_damaged_and_unsafe_files(simclr_run, sharded, tmp_path):
    folder = newest(shutil.copytree(simclr_run, tmp_path / "run"))
    file = folder / "mp_rank_00_model_states.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    with pytest.raises(ConfigError, match=f"step-00000002: .*corrupt: .*{file.name}"):
        whole_tensors(folder)
    _forget_fingerprints(folder)
    for write, message in (
        (lambda: file.write_bytes(content[: len(content) // 2]), r"step-00000002: is damaged \(.+\)"),
        (lambda: torch.save({"other": 1}, file), "is damaged .*'buffer_names'"),
        (file.unlink, f"has no {file.name}"),
    ):
        write()
        with pytest.raises(ConfigError, match=message):
            whole_tensors(folder)
    parts = shutil.copytree(newest(sharded), tmp_path / "parts")
    shard = parts / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.unlink()
    with pytest.raises(ConfigError, match=f"has no {shard.name}"):
        whole_tensors(parts)
