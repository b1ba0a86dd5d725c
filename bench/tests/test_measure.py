"""The memory that is reported is the memory that is held."""

from __future__ import annotations

import pytest
import torch

from bench.measure import peak_bytes

_MEGA = 250_000  # fp32 numbers in a megabyte of 10^6 bytes


@torch.library.custom_op("fasttrain_bench::hold", mutates_args=())
def hold(x: torch.Tensor) -> torch.Tensor:
    """Two megabytes inside an opaque operator, released before it returns."""
    inside = torch.empty(2 * _MEGA)
    torch.mul(x, 2, out=inside[:_MEGA])
    return inside[:1].clone()


def _keep_three():
    return [torch.empty(_MEGA) for _ in range(3)]


def _one_after_the_other():
    for _ in range(3):
        torch.empty(_MEGA)


def _into_out():
    x, out = torch.ones(_MEGA), torch.empty(0)
    torch.add(x, x, out=out)  # grows out


def _backward():
    x = torch.ones(_MEGA, requires_grad=True)  # saved, squared, and twice its gradient on the way back
    return torch.autograd.grad((x * x).sum(), x)


@pytest.mark.parametrize(
    ("call", "megabytes"), [(_keep_three, 3), (_one_after_the_other, 1), (_into_out, 2), (_backward, 3)]
)
def test_peak_of_plain_calls(call, megabytes):
    call()
    assert peak_bytes(call) == pytest.approx(megabytes * 1e6, abs=1000)


def test_buffers_inside_a_custom_operator_count():
    x = torch.ones(_MEGA)
    hold(x)
    assert peak_bytes(lambda: hold(x)) == pytest.approx(2e6, abs=1000)


def test_what_was_held_before_does_not_count():
    held = [torch.ones(_MEGA)]
    assert peak_bytes(held.clear) == 0
