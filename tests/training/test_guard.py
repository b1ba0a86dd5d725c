"""The numerics guard: a skipped step changes nothing, at every ZeRO stage and for every method with state."""

import math
from contextlib import contextmanager

import pytest
import torch

from fasttrain.config.resolve import resolve
from fasttrain.distributed.signals import Signals
from fasttrain.distributed.world import World, initialise
from fasttrain.engine.build import build_method
from fasttrain.engine.engine import Engine
from fasttrain.errors import Diverged
from fasttrain.pipelines import Batch
from fasttrain.training.guard import Guard, fault

IMAGES, BATCH = 32, 8
_SMALL = {"recipe": "cifar", "batch_size_per_gpu": BATCH, "warmup_epochs": 0, "deterministic": True}
_METHODS = {
    "simclr": {"hidden_dim": 16, "out_dim": 8},
    "byol": {"hidden_dim": 16, "out_dim": 8},
    "cmc": {"out_dim": 8, "negatives": 4},
    "deepcluster": {"hidden_dim": 16, "out_dim": 8, "nmb_prototypes": 4},
    "dino": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8, "freeze_last_layer": 0},
    "moco": {"queue_length": 16, "out_dim": 8},
    "swav": {"hidden_dim": 16, "out_dim": 8, "nmb_prototypes": 6, "queue_length": 16, "epoch_queue_starts": 0},
}


@contextmanager
def guarded(name, stage=0, limit=3, **more):
    """Make a guard over a small engine that always starts from the same weights."""
    world = World.from_environment()
    initialise(world)
    config = resolve(name, {**_SMALL, **_METHODS[name], "zero_stage": stage, **more})
    torch.manual_seed(0)
    engine = Engine(config, build_method(config, images=IMAGES, world_size=1), world, steps_per_epoch=4)
    guard = Guard(engine, limit)
    guard.config = config
    if engine.method.needs_first_pass:
        engine.first_pass(batch(config, index) for index in range(IMAGES // BATCH))
        engine.start_epoch(0)
    yield guard
    engine.close()


def batch(config, index, poison=False):
    """Return batch number ``index``; a poisoned batch has one value that is NaN."""
    generator = torch.Generator().manual_seed(1 + index)
    channels = config.views.channels
    views = [torch.randn(n, BATCH, channels, size, size, generator=generator) for size, n in config.views.groups]
    if poison:
        views[0][0, 0] = math.nan
    return Batch(tuple(views), None, (torch.arange(BATCH) + index * BATCH) % IMAGES)


def steps(guard, indices, poisoned=(), measure=False):
    """Return the findings of the steps with these numbers."""
    micro = guard.engine.train.gradient_accumulation_steps
    finding = []
    for index in indices:
        batches = [batch(guard.config, index * micro + k, poison=index in poisoned and k == 0) for k in range(micro)]
        finding.append(guard.step(batches, guard.engine.step_at(index, measure=measure), Signals())[1])
    return finding


def state(engine):
    """Return every tensor of the method and of the optimizer."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.method.parameters()), enabled=engine.stage == 3):
        tensors = {name: tensor.detach().clone() for name, tensor in engine.method.state_dict().items()}
    for number, one in enumerate(engine.optimizer.state.values()):
        tensors |= {f"optimizer {number} {name}": torch.as_tensor(value).clone() for name, value in one.items()}
    return tensors


_TWO = {"gradient_accumulation_steps": 2}
_OFFLOADED = {"offload_optimizer": True}
_PLACES = [(0, {}), *((stage, more) for stage in (1, 2, 3) for more in ({}, _OFFLOADED))]
_CASES = [("simclr", stage, _TWO | more) for stage, more in _PLACES if stage]
_CASES += [(name, 0, {}) for name in _METHODS if name != "cmc"]
_CASES += [("swav", 3, {}), ("cmc", 0, _TWO), ("dino", 2, {"optimizer": "lars"})]


@pytest.mark.parametrize(("name", "stage", "more"), _CASES, ids=str)
def test_skipped_step_leaves_every_tensor_unchanged(name, stage, more):
    """Steps 0, 1 (bad) and 2 give the same tensors as steps 0 and 2, to the last bit."""
    ends = []
    for poisoned in ((1,), ()):
        with guarded(name, stage, **more) as guard:
            finding = steps(guard, (0, 1, 2) if poisoned else (0, 2), poisoned)
            assert [f.fault is not None for f in finding] == ([False, True, False] if poisoned else [False, False])
            assert guard.skipped == len(poisoned)
            assert guard.consecutive == 0
            ends.append(state(guard.engine))
    assert ends[0].keys() == ends[1].keys()
    assert any(key.startswith("optimizer") for key in ends[0])
    assert [key for key, value in ends[0].items() if not torch.equal(value, ends[1][key])] == []
    assert all(value.isfinite().all() for value in ends[0].values())


def test_step_without_images_on_a_rank_is_skipped():
    with guarded("moco") as guard:
        steps(guard, [0])
        before = state(guard.engine)
        step = guard.engine.step_at(1, measure=False)
        _, finding = guard.step([batch(guard.config, 1)], step, Signals(), lambda: True)
        assert finding.data_failed
        assert finding.fault == "a rank has no images at step 2"
        assert [key for key, value in state(guard.engine).items() if not torch.equal(value, before[key])] == []


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(("stage", "more"), _PLACES, ids=str)
def test_norm_is_of_the_whole_averaged_gradient(stage, more, micro):
    config = resolve("simclr", {**_SMALL, **_METHODS["simclr"]})
    torch.manual_seed(0)
    method = build_method(config, images=IMAGES, world_size=1)
    with guarded("simclr", stage, gradient_accumulation_steps=micro, clip_grad=0.01, **more) as guard:
        (finding,) = steps(guard, [0])
        step = guard.engine.step_at(0, measure=False)
        losses = [method(batch(config, k).views, step, torch.arange(BATCH)).loss for k in range(micro)]
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = torch.stack([p.grad.double().square().sum() for p in method.parameters() if p.grad is not None]).sum().sqrt()
    assert finding.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert finding.grad_norm > 0.01
    assert finding.terms["loss"] == pytest.approx(float(mean), rel=1e-5)


@pytest.mark.parametrize("name", ["simclr", "dino"])
def test_bound_is_the_mean_over_micro_batches(name):
    """The deficit once covered the last micro-batch only."""
    config = resolve(name, {**_SMALL, **_METHODS[name]})
    torch.manual_seed(0)
    method = build_method(config, images=IMAGES, world_size=1)
    with guarded(name, **_TWO) as guard:
        (finding,) = steps(guard, [0], measure=True)
        step = guard.engine.step_at(0, measure=True)
    bounds = [method(batch(config, k).views, step, torch.arange(BATCH)).bound for k in range(2)]
    for term in ("entropy", "reconstruction", "deficit"):
        values = [float(getattr(bound, term)) for bound in bounds]
        assert finding.terms[term] == pytest.approx(sum(values) / 2, rel=1e-4)
        assert values[0] != values[1]


def test_micro_batches_draw_different_random_numbers():
    """They once had the same drop path masks. The first micro-batch draws as without accumulation."""
    drawn = []
    for more in (_TWO, {}):
        with guarded("simclr", **more) as guard:
            drawn.append([])
            guard.engine.method.register_forward_pre_hook(lambda *_: drawn[-1].append(float(torch.rand(()))))
            steps(guard, [0, 1])
    of_two, alone = drawn
    assert len(set(of_two)) == 4
    assert of_two[::2] == alone


@pytest.mark.parametrize(("stage", "more"), _PLACES, ids=str)
def test_infinite_gradient_is_named_by_its_group(stage, more):
    with guarded("dino", stage, **more) as guard:
        before = state(guard.engine)
        weight = guard.engine.method.student.prototypes.weight
        handle = weight.register_hook(lambda gradient: gradient * math.inf)
        (finding,) = steps(guard, [0])
        handle.remove()
        assert finding.fault == "the gradient of the prototypes is not finite at step 1"
        assert math.isfinite(finding.terms["loss"])
        assert not math.isfinite(finding.grad_norm)
        assert all(torch.equal(value, before[key]) for key, value in state(guard.engine).items() if key in before)
        assert steps(guard, [1])[0].fault is None


def test_fp16_scale_search_does_not_count_as_a_fault():
    with guarded("simclr", precision="fp16", limit=1) as guard:
        weight = next(guard.engine.method.parameters())
        handle = weight.register_hook(lambda gradient: gradient * math.inf)
        before = guard.engine.loss_scale
        for index in range(3):
            (finding,) = steps(guard, [index])
            guard.judge(finding)
        assert guard.engine.loss_scale == before / 8
        assert (guard.skipped, guard.consecutive) == (3, 0)
        handle.remove()
        (good,) = steps(guard, [3])
    with guarded("simclr") as exact:
        assert good.grad_norm == pytest.approx(steps(exact, [3])[0].grad_norm, rel=0.05)


def test_consecutive_faults_end_the_run_with_the_last_values():
    with guarded("simclr", limit=2) as guard:
        (good,) = steps(guard, [0], measure=True)
        for finding in steps(guard, [1], poisoned=[1]) + steps(guard, [2]):  # a good one between
            guard.judge(finding)
        (first,) = steps(guard, [3], poisoned=[3])
        guard.judge(first)
        (second,) = steps(guard, [4], poisoned=[4])
        with pytest.raises(Diverged) as stop:
            guard.judge(second)
    message = str(stop.value)
    assert message.startswith("the loss is nan at step 5; skipped 2 consecutive steps; step 3 had loss ")
    assert f"entropy {good.terms['entropy']:.4g}, reconstruction {good.terms['reconstruction']:.4g}" in message
    assert "gradient norm " in message
    assert "--lr" in message


@pytest.mark.parametrize(
    ("terms", "roles", "message"),
    [
        ({"loss": 1.0, "entropy": math.nan}, [], None),  # measured, but no part of the objective
        ({"loss": math.nan}, ["weight matrices"], "the loss is nan at step 7"),
        (
            {"loss": math.inf, "entropy": -math.inf, "reconstruction": 2.0},
            [],
            "the loss is inf at step 7 (entropy -inf)",
        ),
        (
            {"loss": 1.0},
            ["weight matrices", "predictor's biases and norms"],
            "the gradient of the weight matrices and of the predictor's biases and norms is not finite at step 7",
        ),
    ],
)
def test_fault_names_the_term(terms, roles, message):
    assert fault(7, terms, roles) == message


def test_twin_names_its_terms_at_unlogged_steps():
    with guarded("simclr", entropy=True) as guard:
        good, bad = steps(guard, [0, 1], poisoned=[1])
    assert good.terms["loss"] == pytest.approx(good.terms["reconstruction"] - good.terms["entropy"], rel=1e-5)
    assert bad.fault == "the loss is nan at step 2 (entropy nan, reconstruction nan)"
