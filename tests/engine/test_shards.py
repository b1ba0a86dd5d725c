"""Layouts that LARS, LAMB and clipping receive. Training with them is tested in tests/distributed/test_two_ranks.py."""

from types import SimpleNamespace

import pytest
import torch

from fasttrain.engine import shards as shards_module
from fasttrain.engine import zero
from fasttrain.engine.shards import find_shards
from fasttrain.errors import ConfigError
from tests.checkpoints import small_engine


@pytest.mark.parametrize(
    ("numel", "value", "problem"), [(4, 1, None), (3, 1, "head.* have 3 of 4 elements"), (4, 2, "head.* other values")]
)
def test_layout_that_is_not_deepspeeds_is_found(monkeypatch, numel, value, problem):
    """A stage-2 optimizer of the only rank, which has ``numel`` elements of a parameter of 4."""
    monkeypatch.setattr(shards_module.dist, "all_reduce", lambda tensor, group: None)
    address, parameter, flat = SimpleNamespace(start=0, numel=numel), torch.ones(4), torch.full((4,), float(value))
    parameter._hp_mapping = SimpleNamespace(get_hp_fragment_address=lambda: address, lp_fragment_address=address)
    optimizer = SimpleNamespace(
        dp_process_group=None,
        single_partition_of_fp32_groups=[flat],
        bit16_groups=[[parameter]],
        averaged_gradients={},
        cpu_offload=False,
    )
    if problem is None:
        assert find_shards(optimizer, 2, {parameter: "head"}).layouts[flat] == [(0, 4)]
    else:
        with pytest.raises(ConfigError, match=f"--zero_stage 2: deepspeed .*{problem}.*--zero_stage 0"):
            find_shards(optimizer, 2, {parameter: "head"})


@pytest.mark.parametrize(("stage", "name"), [(1, "averaged_gradients"), (3, "checkpoint_event_epilogue")])
def test_name_that_is_used_later_is_checked_at_the_start(monkeypatch, stage, name):
    """Another version of DeepSpeed was noticed at the first checkpoint, or never."""
    monkeypatch.setitem(zero._OPTIMIZER_NAMES, stage, f"dp_process_group {name}")
    with pytest.raises(ConfigError, match=f"has no {name}. Install deepspeed=="):
        find_shards(SimpleNamespace(dp_process_group=None), stage, {})


@pytest.mark.parametrize("stage", [1, 3])
def test_installed_version_has_the_layout(stage):
    with small_engine(zero_stage=stage) as engine:
        zero.check_names(engine.optimizer, stage)


def test_stage_0_has_no_shards():
    assert find_shards(SimpleNamespace(), 0, {}) is None
