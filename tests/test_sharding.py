"""What LARS and LAMB are told of ZeRO's shards; that they then train right is tested in test_two_ranks.py."""

from types import SimpleNamespace

import pytest
import torch

from fasttrain import sharding
from fasttrain.config import ConfigError
from fasttrain.layerwise import Lars
from fasttrain.sharding import parameter_by_parameter, shard_norms


def test_the_parts_of_a_parameter_smaller_than_the_world():
    layouts = [parameter_by_parameter([(1, 1), (5, 2)], rank) for rank in range(4)]
    assert [piece.numel for layout in layouts for piece in layout] == [1, 2, 0, 2, 0, 1, 0, 0]
    assert [layout[1].start for layout in layouts] == [1, 1, 1, 1]


def _zero(optimizer, found):
    """DeepSpeed's optimizer of stage 2 on the only rank, which found ``found`` elements of a parameter of 4."""
    address = SimpleNamespace(start=0, numel=found)
    parameter = torch.ones(4)
    parameter._hp_mapping = SimpleNamespace(get_hp_fragment_address=lambda: address)
    flat = torch.ones(4, requires_grad=True)
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(4)
    return SimpleNamespace(
        optimizer=optimizer,
        dp_process_group=None,
        single_partition_of_fp32_groups=[flat],
        bit16_groups=[[parameter]],
    )


def test_elements_that_no_rank_holds_are_found(monkeypatch):
    monkeypatch.setattr(sharding.dist, "all_reduce", lambda tensor, group: None)
    optimizer = Lars([torch.ones(1)], lr=1)
    shard_norms(_zero(optimizer, 4), 2)
    optimizer.step()
    with pytest.raises(ConfigError, match=r"shards parameters in a way .*; use --zero_stage 0 or another DeepSpeed"):
        shard_norms(_zero(optimizer, 3), 2)


def test_whole_parameters_and_other_optimizers_need_nothing():
    shard_norms(Lars([torch.ones(1)]), 0)
    shard_norms(SimpleNamespace(optimizer=torch.optim.SGD([torch.ones(1)])), 2)
