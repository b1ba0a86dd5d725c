"""Test the peak of memory."""

from __future__ import annotations

import pytest
import torch

from bench.measure import peak_bytes

_MEGA = 250_000  # fp32 numbers in a megabyte of 10^6 bytes


@torch.library.custom_op("fasttrain_bench::allocate", mutates_args=())
def allocate(x: torch.Tensor) -> torch.Tensor:
    """Allocate two megabytes in an opaque operator, and release them before it returns."""
    inside = torch.empty(2 * _MEGA)
    torch.mul(x, 2, out=inside[:_MEGA])
    return inside[:1].clone()


def _three_at_once():
    return [torch.empty(_MEGA) for _ in range(3)]


def _out_argument():
    x, out = torch.ones(_MEGA), torch.empty(0)
    torch.add(x, x, out=out)  # grows out


def _backward():
    x = torch.ones(_MEGA, requires_grad=True)  # saved, squared, and twice its gradient in the backward pass
    return torch.autograd.grad((x * x).sum(), x)


_X = torch.ones(_MEGA)


@pytest.mark.parametrize(
    ("call", "megabytes"),
    [(_three_at_once, 3), (_out_argument, 2), (_backward, 3), (lambda: allocate(_X), 2)],
    ids=["at once", "out", "backward", "custom operator"],
)
def test_peak_bytes_counts_every_allocation(call, megabytes):
    call()
    assert peak_bytes(call) == pytest.approx(megabytes * 1e6, abs=1000)


def test_peak_bytes_ignores_memory_from_before():
    tensors = [torch.ones(_MEGA)]
    assert peak_bytes(tensors.clear) == 0
