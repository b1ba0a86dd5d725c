"""Gradients across ranks, with a group of one rank. tests/losses/unequal_batches.py and compat have two."""

from types import SimpleNamespace

import pytest
import torch

from fasttrain.kernels import row_logsumexp
from fasttrain.kernels.similarity import ranks
from tests.kernels.similarity.uses import rows

GROUP = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
BOTH = pytest.mark.parametrize("same", [True, False], ids=["itself", "pair"])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(ranks, "start_gather", lambda x, group: x.clone)


def logsumexp(same, scale, group=GROUP, backend="cpu"):
    """Return two leaves and their log-sum-exps."""
    x, y = (rows(5, 4, k).requires_grad_() for k in (0, 1))
    y = x if same else y
    return x, row_logsumexp(x, y, scale=scale, backend=backend, group=group, check_batches=False)


@BOTH
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_learnt_scale_has_the_gradient_of_one_process(same, value):
    gradients = []
    for options in ({}, {"group": None, "backend": "eager"}):
        scale = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        x, lse = logsumexp(same, scale, **options)
        gradients.append(torch.autograd.grad((lse * torch.arange(5)).sum(), [x, scale]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@BOTH
def test_second_derivative_is_an_error(same):
    x, lse = logsumexp(same, 2.0)
    (gradient,) = torch.autograd.grad((lse * lse).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@BOTH
def test_scale_that_changed_before_the_backward_pass_is_an_error(same):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    _, lse = logsumexp(same, scale)
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()
