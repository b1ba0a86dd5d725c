import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.kernels import bidirectional_logsumexp, row_logsumexp
from fasttrain.kernels.similarity import cpu
from tests.kernels.similarity.uses import USES, check, rows, uses_and_types

# One, two, odd, just above a tile, several tiles with a remainder.
SIZES = [(1, 1, 2), (2, 3, 1), (7, 5, 16), (769, 130, 33), (65, 4097, 8)]
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(("use", "dtype"), uses_and_types(*TYPES), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cpu_equals_the_reference(use, dtype, size):
    for scale in (0.01, 2.0, 39.0, 41.0, 1000.0):
        check(use, "cpu", *size, dtype, scale)


@pytest.mark.parametrize("scale", [3.0, 80.0], ids=["bounded", "running maximum"])
@pytest.mark.parametrize("use", USES)
def test_gradients_over_several_tiles_pass_gradcheck(use, scale, monkeypatch):
    monkeypatch.setattr(cpu, "_TILE", 3)
    x, y = rows(5, 3, 0).requires_grad_(), rows(7, 3, 1).requires_grad_()
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: tuple(USES[use](*a, scale=scale, backend="cpu")), (x, y, bias))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 50), st.floats(-60, 60))
def test_result_does_not_depend_on_the_tile(n, m, d, tile, scale):
    x, y = rows(n, d, 2), rows(m, d, 3)
    expected = bidirectional_logsumexp(x, y, scale=scale, backend="eager")
    with mock.patch.object(cpu, "_TILE", tile):
        lses = bidirectional_logsumexp(x, y, scale=scale, backend="cpu")
    for a, b in zip(lses, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_no_matrix_of_all_scores_is_stored():
    """Checks the largest allocation of forward and backward for 5000 rows."""
    z = rows(5000, 16, 0, torch.float32).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        row_logsumexp(z, z, scale=10.0, exclude_self=True, backend="cpu").mean().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * cpu._TILE**2 < 4 * 5000**2 / 40


def test_broken_promise_of_unit_norm_gives_the_right_sum():
    """Scale 1 would pass for bounded, but the scores of these rows reach 1e4."""
    x = (100 * rows(6, 4, 0)).float()
    lse = row_logsumexp(x, x, scale=1.0, unit_norm=True, backend="cpu")
    expected = row_logsumexp(x.double(), x.double(), scale=1.0, backend="eager")
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=0)


def test_denormal_probabilities_have_finite_gradients():
    x, y = rows(4, 3, 0, torch.float32).requires_grad_(), rows(5, 3, 1, torch.float32)
    row_logsumexp(x, y, scale=1e4, backend="cpu").sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.norm() == pytest.approx(1e4 * math.sqrt(4), rel=1e-3)
