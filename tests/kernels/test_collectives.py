"""Gradients, and the message for unequal batches. tests/losses/test_unequal_batches.py compares them on two ranks."""

from types import SimpleNamespace

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


@pytest.fixture
def two_equal_ranks(monkeypatch):
    """A group of two ranks with equal tensors."""
    monkeypatch.setattr(collectives, "start_gather", lambda x, group: lambda: torch.cat([x, x]))
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda x, group: x.mul_(2))
    return SimpleNamespace(size=lambda: 2, rank=lambda: 1)


def test_gathered_rows_leave_the_gradient_of_other_branches(two_equal_ranks):
    """Regression: the gradient was summed over the ranks in place, but autograd had given it to ``other``, too."""
    x, other, weights = torch.ones(2, 1, requires_grad=True), torch.ones(4, 1, requires_grad=True), torch.arange(4.0)
    first = other * 1  # created before the gather, so its backward pass comes after
    (weights[:, None] * (collectives.gather_rows(x, two_equal_ranks) + first)).sum().backward()
    assert other.grad.flatten().tolist() == [0, 1, 2, 3]
    assert x.grad.flatten().tolist() == [4, 6]


@pytest.mark.parametrize("function", [collectives.gather_rows, collectives.mean_over_ranks])
def test_second_derivative_is_an_error(function, two_equal_ranks):
    x = torch.ones(2, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x, two_equal_ranks).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
