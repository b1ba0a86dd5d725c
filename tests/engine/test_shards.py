"""Layouts that LARS, LAMB and clipping receive. Training with them is tested in tests/distributed/test_two_ranks.py."""

from types import SimpleNamespace

import pytest
import torch

from fasttrain.engine import shards as shards_module
from fasttrain.engine.shards import find_shards
from fasttrain.errors import ConfigError


@pytest.mark.parametrize("numel", [4, 3])
def test_elements_that_no_rank_has_are_found(monkeypatch, numel):
    """A stage-2 optimizer of the only rank, which has ``numel`` elements of a parameter of 4."""
    monkeypatch.setattr(shards_module.dist, "all_reduce", lambda tensor, group: None)
    address, parameter, flat = SimpleNamespace(start=0, numel=numel), torch.ones(4), torch.ones(4)
    parameter._hp_mapping = SimpleNamespace(get_hp_fragment_address=lambda: address, lp_fragment_address=address)
    optimizer = SimpleNamespace(
        dp_process_group=None, single_partition_of_fp32_groups=[flat], bit16_groups=[[parameter]]
    )
    if numel == 4:
        assert find_shards(optimizer, 2).layouts[flat] == [(0, 4)]
    else:
        with pytest.raises(ConfigError, match="--zero_stage 2"):
            find_shards(optimizer, 2)


def test_stage_0_has_no_shards():
    assert find_shards(SimpleNamespace(), 0) is None
