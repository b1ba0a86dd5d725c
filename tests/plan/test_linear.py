"""The linear layer of ZeRO-3 has torch's results and saves DeepSpeed's tensors."""

from contextlib import nullcontext

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from fasttrain.plan.linear import linear_of_zero3


def _run(mode, shape, bias, low, linear=None):
    torch.manual_seed(0)
    x = torch.randn(*shape, 6, requires_grad=True)
    w = torch.nn.Parameter(torch.randn(5, 6))
    b = torch.nn.Parameter(torch.randn(5)) if bias else None
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t)
    with hooks, mode, torch.autocast("cpu", torch.bfloat16, enabled=low):
        y = (linear or torch.nn.functional.linear)(x, w, b)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad for p in (x, w, b) if p is not None)], kept


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_linear_matches_torch_and_deepspeed(shape, bias, low):
    ours, kept = _run(linear_of_zero3(), shape, bias, low)
    plain, _ = _run(nullcontext(), shape, bias, low)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05 if low else 1e-5, atol=0.1 if low else 1e-5)
    assert (torch.Size([*shape, 6]), torch.float32) in kept
    if get_accelerator().device_name() == "cpu":
        theirs, kept_there = _run(nullcontext(), shape, bias, low, zero3_linear_wrap)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert kept == kept_there
