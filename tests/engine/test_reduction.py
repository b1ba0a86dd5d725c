"""Gradients are the mean over the ranks, sent during backward in the same order on every rank."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fasttrain.engine import reduction as module
from fasttrain.engine.reduction import GradientReduction, buckets


@pytest.fixture
def sent(monkeypatch):
    """The sizes of the messages. The other rank has the same gradients, plus 2."""
    sizes = []

    def all_reduce(flat, async_op):
        assert async_op
        sizes.append(len(flat))
        flat += flat + 2
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(module, "BUCKET", 40)
    return sizes


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2), nn.Linear(2, 2))


def _gradients(network):
    return [p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_means_and_most_are_sent_during_backward(sent, dtype):
    plain, network = _network(), _network()
    reduction = GradientReduction(network.parameters(), 2, dtype)
    batch = torch.randn(3, 4)
    plain(batch).square().mean().backward()
    expected = [gradient + 1 for gradient in _gradients(plain)]
    with reduction.during_backward():
        network(batch).square().mean().backward()
        assert len(sent) == len(reduction._buckets) > 1
    tolerance = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(_gradients(network), expected, **tolerance)
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
    with reduction.during_backward():  # the context may be entered again
        network.zero_grad()
        network(batch).square().mean().backward()
    torch.testing.assert_close(_gradients(network), expected, **tolerance)


def test_closed_reduction_frees_the_network(sent):
    """The hooks of the gradients kept the network of every run of a process."""
    network = _network()
    freed = weakref.ref(network[0])
    reduction = GradientReduction(network.parameters(), 2, torch.float32)
    with reduction.during_backward():
        network(torch.randn(3, 4)).square().mean().backward()
    reduction.close()
    del network, reduction
    gc.collect()
    assert freed() is None


def test_accumulated_gradients_are_sent_once(sent):
    plain, network = _network(), _network()
    reduction = GradientReduction(network.parameters(), 2, torch.float32)
    first, second = torch.randn(2, 3, 4)
    for model in (plain, network):
        model(first).square().mean().backward()
    assert sent == []
    plain(second).square().mean().backward()
    with reduction.during_backward():
        network(second).square().mean().backward()
    assert len(sent) == len(reduction._buckets)
    torch.testing.assert_close(_gradients(network), [gradient + 1 for gradient in _gradients(plain)])


def test_parameter_that_this_rank_does_not_use_gets_the_mean(sent):
    """Another rank may use it, so every rank sends every bucket, in one order."""
    network = _network()
    reduction = GradientReduction(network.parameters(), 2, torch.float32)
    with reduction.during_backward():
        network[:3](torch.randn(3, 4)).square().mean().backward()
        assert sent == []  # the unused layer is in the first bucket
    assert torch.equal(network[3].weight.grad, torch.ones(2, 2))
    assert len(sent) == len(reduction._buckets)


def test_gradients_are_not_sent_after_an_error(sent):
    network = _network()
    reduction = GradientReduction(network.parameters(), 2, torch.float32)
    with pytest.raises(ZeroDivisionError), reduction.during_backward():
        raise ZeroDivisionError
    network(torch.randn(3, 4)).square().mean().backward()
    assert sent == []


def test_parameter_that_is_larger_than_a_bucket_is_alone():
    sizes = [3, 2, 9, 1, 1, 4]
    lists = buckets([torch.zeros(n) for n in sizes], 5)
    assert [[len(p) for p in one] for one in lists] == [[3, 2], [9], [1, 1], [4]]
