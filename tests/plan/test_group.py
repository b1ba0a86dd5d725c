"""The group records messages and has any size."""

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttrain.kernels.collectives import check_equal_batches, gather_rows, mean_over_ranks
from fasttrain.plan.group import Message, planned_group


def test_group_records_the_bytes_of_all_ranks():
    group = planned_group(512)
    assert (group.size(), group.rank()) == (512, 0)
    with FakeTensorMode():
        x = torch.empty(3, 5, requires_grad=True)
        rows = gather_rows(x, group)
        assert rows.shape == (3 * 512, 5)
        with group.topic("a mean"):
            mean_over_ranks(rows.sum(), group).backward()
        dist.broadcast(torch.empty(7), group_src=0, group=group)
        check_equal_batches("a method's own reduction", group, x)  # has no values to compare
    whole = 4 * 3 * 5 * 512
    assert group.messages == [
        Message("all_gather", whole, "loss and centre"),
        Message("all_reduce", 4, "a mean"),
        Message("all_reduce", 4, "a mean"),
        Message("all_reduce", whole, "a mean"),
        Message("broadcast", 28, "loss and centre"),
    ]
    assert planned_group(1) is None
