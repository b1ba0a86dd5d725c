"""The message for unequal batches. tests/losses/test_unequal_batches.py compares them on two ranks."""

import pytest
import torch

from fasttrain.kernels import collectives
from fasttrain.plan.group import PlannedGroup


def test_message_names_sizes_and_few_ranks(monkeypatch):
    batches = [[[8, 3, -1, 0]]] * 11 + [[[6, 3, -1, 0]]]
    monkeypatch.setattr(collectives, "_batches_of_all_ranks", lambda rows, group: batches)
    sizes = r"\(8, 3\) float32 on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 3 more, \(6, 3\) float32 on rank 11\. Use drop_last"
    with pytest.raises(ValueError, match=f"^a loss: .*{sizes}"):
        collectives.check_equal_batches("a loss", PlannedGroup(0, 12), torch.zeros(8, 3))


def test_types_are_named_if_known():
    assert collectives._describe(8, 3, -1, 2) == "(8, 3) bfloat16"
    assert collectives._describe(8, -1, -1, -1) == "(8,) of another type"
