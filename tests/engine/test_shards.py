"""What LARS and LAMB are told of ZeRO's shards; that they then train right is tested in test_two_ranks.py."""

from types import SimpleNamespace

import pytest
import torch

from fasttrain.engine import shards as sharding
from fasttrain.engine.shards import find_shards, inner, parameter_by_parameter, share_weights
from fasttrain.errors import ConfigError
from fasttrain.optim.layerwise import Lars


def test_the_parts_of_a_parameter_smaller_than_the_world():
    layouts = [parameter_by_parameter([(1, 1), (5, 2)], rank) for rank in range(4)]
    assert [piece.numel for layout in layouts for piece in layout] == [1, 2, 0, 2, 0, 1, 0, 0]
    assert [layout[1].start for layout in layouts] == [1, 1, 1, 1]


def _zero(optimizer, found):
    """DeepSpeed's optimizer of stage 2 on the only rank, which found ``found`` elements of a parameter of 4."""
    address = SimpleNamespace(start=0, numel=found)
    parameter = torch.ones(4)
    parameter._hp_mapping = SimpleNamespace(get_hp_fragment_address=lambda: address, lp_fragment_address=address)
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
    zero = _zero(Lars([torch.ones(1)], lr=1), 4)
    shards = find_shards(zero, 2)
    inner(zero).shard(shards.layouts, shards.sum_over_ranks)
    inner(zero).step()
    with pytest.raises(ConfigError, match=r"shards parameters in a way .*; use --zero_stage 0 or another DeepSpeed"):
        find_shards(_zero(Lars([torch.ones(1)], lr=1), 3), 2)


def test_stage_0_shards_nothing():
    optimizer = Lars([torch.ones(1)])
    assert find_shards(optimizer, 0) is None
    assert inner(optimizer) is optimizer


@pytest.mark.parametrize(
    ("dtype", "offload", "shared"), [("float32", False, True), ("bfloat16", False, False), ("float32", True, False)]
)
def test_stage_3_steps_the_weights_themselves_unless_they_have_to_be_copied(dtype, offload, shared):
    held, stepped = torch.zeros(4, dtype=getattr(torch, dtype)), torch.zeros(4, requires_grad=True)
    zero = SimpleNamespace(
        fp16_partitioned_groups_flat=[held], fp32_partitioned_groups_flat=[stepped], offload_optimizer=offload
    )
    share_weights(zero, 3)
    with torch.no_grad():
        stepped += 1
    assert (held == int(shared)).all()
