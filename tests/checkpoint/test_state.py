"""Whatever stage wrote a checkpoint, any stage goes on from it, with every method and every optimizer.

Other numbers of ranks are in test_two_ranks.py; here their shards are cut by hand.
"""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain import methods
from fasttrain.checkpoint import state as saved_state
from fasttrain.checkpoint.store import Card, publish, restore
from fasttrain.config.resolve import resolve
from fasttrain.distributed.world import World, initialise
from fasttrain.engine.build import build_method
from fasttrain.engine.engine import Engine
from fasttrain.errors import ConfigError
from fasttrain.pipelines import Batch
from tests.training.test_every_method import SETTINGS

_BATCH, _IMAGES, _WORLD = 8, 32, World(0, 1, 0, 1)


def _engine(method, stage, *, seed=0, **values):
    initialise(_WORLD)
    shared = {"recipe": "cifar", "batch_size_per_gpu": _BATCH, "epochs": 2, "zero_stage": stage, "warmup_epochs": 0}
    config = resolve(method, {**shared, **SETTINGS[method], **values})
    torch.manual_seed(seed)
    engine = Engine(config, build_method(config, images=_IMAGES, world_size=1), _WORLD, steps_per_epoch=4)
    engine.views = config.views
    return engine


def _train(engine, indices):
    """Losses of the steps with these numbers; step k sees the same images in every engine of a method."""
    losses = []
    for index in indices:
        if index == 0 and engine.method.needs_first_pass:
            engine.first_pass(_batch(engine, number) for number in range(_IMAGES // _BATCH))
        if index % 4 == 0:
            engine.start_epoch(index // 4)
        step = engine.step_at(index, measure=True)
        losses.append(engine.micro_step(_batch(engine, index), step).loss.item())
        engine.update(step)
    return losses


def _batch(engine, index):
    generator = torch.Generator().manual_seed(1 + index)
    views = engine.views
    groups = [(count, _BATCH, views.channels, size, size) for size, count in views.groups]
    numbers = torch.arange(_BATCH) + index * _BATCH % _IMAGES
    return Batch(tuple(torch.randn(shape, generator=generator) for shape in groups), None, numbers)


def _card(engine, method, optimizer="adamw", step=3):
    return Card(method, False, "conv_small", optimizer, step, 1, engine.stage, "0", _BATCH)


def _contents(folder, stage):
    """Every tensor and number of a published checkpoint, whole."""
    saved = saved_state.read(folder, stage, 1, ())
    found = {("buffer", name): tensor for name, tensor in saved.buffers.items()}
    for name, parts in saved.weights.items():
        found[name] = torch.cat(parts)
    for name, moments in saved.moments.items():
        for key, value in moments.items():
            found[name, key] = torch.cat(value) if isinstance(value, list) else torch.as_tensor(value)
    numbers = {**saved.counters, "step": saved.optimizer_step or 0}
    return found | {name: torch.as_tensor(value) for name, value in numbers.items()}


def _differences(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("method", methods.names())
def test_every_method_goes_on_to_the_last_bit(tmp_path, method, stage):
    """Once all has moved on, back to the first step and on again; stage 0 is in test_run_of_every_method.py."""
    engine = _engine(method, stage)
    _train(engine, range(1))
    publish(engine, tmp_path / "half", _card(engine, method), keep=False)
    found = []
    for name in ("straight", "resumed"):
        if name == "resumed":
            assert restore(engine, tmp_path / "half" / "step-00000003", _card(engine, method)) == 3
        losses = _train(engine, range(1, 2))
        publish(engine, tmp_path / name, _card(engine, method), keep=False)
        found.append((losses, _contents(tmp_path / name / "step-00000003", stage)))
    engine.close()
    (losses, straight), (again, resumed) = found
    assert again == losses
    assert len([name for name in straight if isinstance(name, tuple) and name[0] != "buffer"]) > 10
    assert _differences(straight, resumed) == []


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars", "lamb"])
def test_every_stage_takes_what_every_other_wrote(tmp_path, optimizer):
    """Through all stages, in engines that started from other weights: nothing changes, and the next loss is the same.

    Of the teacher, the prototypes, what is not trained, and what an optimizer keeps.
    """
    values = {"optimizer": optimizer, "norm_last_layer": False, "use_bn_at_bottleneck": True}
    engine = _engine("dino", 3, **values)
    _train(engine, range(1))
    publish(engine, tmp_path / "3", _card(engine, "dino", optimizer), keep=False)
    expected, losses = _contents(tmp_path / "3" / "step-00000003", 3), [_train(engine, range(1, 2))]
    engine.close()
    for before, stage in ((3, 1), (1, 0), (0, 2), (2, 3)):
        engine = _engine("dino", stage, seed=2, **values)
        restore(engine, tmp_path / str(before) / "step-00000003", _card(engine, "dino", optimizer))
        publish(engine, tmp_path / f"{stage}", _card(engine, "dino", optimizer), keep=False)
        assert _differences(_contents(tmp_path / str(stage) / "step-00000003", stage), expected) == [], stage
        losses.append(_train(engine, range(1, 2)))
        engine.close()
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(losses[:1]).expand(5, 1))


def test_the_loss_scale_of_fp16_goes_on(tmp_path):
    """DeepSpeed does not save it: a resumed run began with 65536 again."""
    engine = _engine("simclr", 0, precision="fp16")
    _train(engine, range(1))
    engine.deepspeed.torch_autocast_z0_gradscaler.load_state_dict(
        engine.deepspeed.torch_autocast_z0_gradscaler.state_dict() | {"scale": 128.0, "_growth_tracker": 7}
    )
    publish(engine, tmp_path, _card(engine, "simclr", step=1), keep=False)
    engine.close()
    resumed = _engine("simclr", 0, precision="fp16", seed=1)
    restore(resumed, tmp_path / "step-00000001", _card(resumed, "simclr"))
    state = resumed.deepspeed.torch_autocast_z0_gradscaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (128.0, 7)
    resumed.close()


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    engine = _engine("byol", 2)
    _train(engine, range(1))
    publish(engine, tmp_path / "byol", _card(engine, "byol", step=1), keep=False)
    engine.close()
    for values, message in (
        ({"out_dim": 16}, r"size mismatch for student.head.3.weight: \(8, 32\) in the checkpoint, \(16, 32\) here"),
        ({"arch": "test_resnet"}, "it has no student.backbone"),
    ):
        other = _engine("byol", 0, **values)
        publish(other, tmp_path / "before", _card(other, "byol", step=1), keep=False)
        with pytest.raises(ConfigError, match=rf"does not fit these settings \({message}.*\); use those of its run's"):
            restore(other, tmp_path / "byol" / "step-00000001", _card(other, "byol"))
        publish(other, tmp_path / "after", _card(other, "byol", step=1), keep=False)
        one, two = (_contents(tmp_path / name / "step-00000001", 0) for name in ("before", "after"))
        assert _differences(one, two) == []
        other.close()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 3), st.data())
def test_any_range_of_a_parameter_is_found_in_the_shards_of_any_number_of_ranks(sizes, ranks, padding, data):
    """Cut end to end as ZeRO-1 and 2 do it, and each for itself as ZeRO-3 does it."""
    names = [f"p{number}" for number in range(len(sizes))]
    tensors = [torch.arange(size) + 100 * number for number, size in enumerate(sizes, 1)]
    flat = torch.cat([*tensors, torch.zeros(padding, dtype=torch.long)])
    together = [part.clone() for part in torch.tensor_split(flat, ranks)]
    parts = [-(-size // ranks) for size in sizes]
    padded = [torch.cat([t, t.new_zeros(p * ranks - len(t))]).split(p) for t, p in zip(tensors, parts, strict=True)]
    apart = [torch.cat([p[rank] for p in padded]) for rank in range(ranks)]
    for cut, shards in ((saved_state._end_to_end, together), (saved_state._by_parameter, apart)):
        places = cut(dict(zip(names, sizes, strict=True)), shards)
        for name, tensor in zip(names, tensors, strict=True):
            found = saved_state._taken(shards, places[name])
            start = data.draw(st.integers(0, len(tensor)))
            numel = data.draw(st.integers(0, len(tensor) - start))
            assert torch.equal(saved_state._narrow(found, start, numel), tensor[start : start + numel])


def test_what_is_written_is_known_to_deepspeed_s_own_converter(tmp_path):
    from deepspeed.checkpoint import DeepSpeedCheckpoint

    engine = _engine("simclr", 1)
    publish(engine, tmp_path, replace(_card(engine, "simclr"), step=1), keep=False)
    engine.close()
    with torch.serialization.safe_globals(saved_state.harmless()):
        states = torch.load(tmp_path / "step-00000001" / "mp_rank_00_model_states.pt", weights_only=True)
    assert states["universal_checkpoint_info"]["universal_checkpoint_version"] >= 0.2
    assert DeepSpeedCheckpoint(str(tmp_path / "step-00000001")).get_checkpoint_info("universal_checkpoint_info")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda saved: {"shapes": _less(saved.shapes, "student.backbone")}, "it has no student.backbone"),
        (
            lambda saved: {"shapes": {**saved.shapes, "student.more": torch.Size([2])}},
            "it has student.more, which",
        ),
        (
            lambda saved: {"moments": _less(saved.moments, "student.head")},
            "student.head.* is trained in one of",
        ),
    ],
)
def test_a_checkpoint_of_another_network_says_where_it_differs(tmp_path, change, why):
    engine = _engine("simclr", 0)
    _train(engine, [0])
    publish(engine, tmp_path, _card(engine, "simclr", step=1), keep=False)
    saved = saved_state.read(tmp_path / "step-00000001", 0, 1, saved_state.trained_names(engine))
    assert saved_state.misfit(saved, engine) is None
    assert re.match(why, saved_state.misfit(replace(saved, **change(saved)), engine))
    engine.close()


def _less(named, prefix):
    """Without the first that begins so."""
    first = next(name for name in named if name.startswith(prefix))
    return {name: value for name, value in named.items() if name != first}
