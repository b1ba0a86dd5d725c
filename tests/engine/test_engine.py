"""The engine chooses the lowest stage whose model state fits, and refuses what DeepSpeed gets wrong."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from fasttrain.config.settings import TrainConfig
from fasttrain.distributed.world import World
from fasttrain.engine import engine
from fasttrain.errors import ConfigError
from fasttrain.methods.base import Step
from tests.checkpoints import small_engine, train
from tests.small_runs import train_few_steps

_CPU = torch.device("cpu")
_TWO = World(rank=0, local_rank=0, size=2, local_size=1)


@pytest.mark.parametrize(("bytes_a_parameter", "stage"), [(20, 0), (18, 1), (17.9, 2), (16, 2), (15.9, 3), (1, 3)])
def test_the_lowest_stage_that_takes_half_the_memory(monkeypatch, bytes_a_parameter, stage):
    # On two ranks a parameter takes 20, 12 + 12/2, 8 + 16/2 and 20/2 bytes.
    monkeypatch.setattr(engine, "_memory", lambda device: 2 * bytes_a_parameter * 1000)
    assert engine.zero_stage(TrainConfig(), 1000, _TWO, _CPU) == stage


def test_ranks_share_the_memory_of_their_machine(monkeypatch):
    monkeypatch.setattr(engine, "_memory", lambda device: 2 * 20 * 1000)
    assert engine.zero_stage(TrainConfig(), 1000, dataclasses.replace(_TWO, local_size=2), _CPU) == 3


def test_one_rank_has_nothing_to_share(monkeypatch):
    monkeypatch.setattr(engine, "_memory", lambda device: 1)
    alone = World(rank=0, local_rank=0, size=1, local_size=1)
    assert engine.zero_stage(TrainConfig(), 1000, alone, _CPU) == 0
    assert engine.zero_stage(TrainConfig(zero_stage=2), 1000, alone, _CPU) == 2


def test_fp16_on_shards_is_refused():
    with pytest.raises(ConfigError, match="--precision fp16 cannot be used with --zero_stage 2"):
        engine.zero_stage(TrainConfig(zero_stage=2, precision="fp16"), 1000, _TWO, _CPU)


def test_the_learning_rate_falls_to_a_tenth_at_each_drop():
    """CMC's schedule: a linear start, then whole until an epoch at which it falls; no cosine."""
    method = SimpleNamespace(momentum=lambda step: None)
    settings = TrainConfig(lr_drops=(2.0, 3.0), warmup_epochs=0.5)
    run = SimpleNamespace(train=settings, steps_per_epoch=4, total_steps=16, peak_lr=0.4, method=method)
    rates = [engine.Engine.schedules(run, Step(index, 16, 4))["lr"] for index in range(16)]
    assert rates == pytest.approx([0.2, *[0.4] * 7, *[0.04] * 4, *[0.004] * 4])


def test_one_rank_alone_reduces_no_gradients(monkeypatch):
    """DeepSpeed would flatten and copy all of them: 8 % of a small step."""
    with small_engine() as alone:
        monkeypatch.setattr(alone.deepspeed, "allreduce_gradients", lambda: pytest.fail("gradients were reduced"))
        before = [p.clone() for p in alone.method.student.parameters()]
        train(alone, 1)
        assert not all(map(torch.equal, before, alone.method.student.parameters()))


def test_torch_has_its_linear_layer_back_after_a_run_at_zero_3(images, tmp_path):
    before = vars(functional)["linear"]
    train_few_steps(images, tmp_path / "run", "--zero_stage", 3)
    assert vars(functional)["linear"] is before
