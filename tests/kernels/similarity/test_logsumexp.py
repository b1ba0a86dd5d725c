import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fasttrain.kernels import bidirectional_logsumexp, row_logsumexp
from tests.kernels.similarity.uses import rows

_BACKENDS = ["cpu", "triton", "eager"]
_sizes = st.integers(1, 30)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(_sizes, _sizes, st.integers(0, 99), st.floats(0.01, 1000))
def test_rows_follow_their_permutation_and_columns_do_not_matter(n, m, seed, scale):
    x, y = rows(n, 4, seed), rows(m, 4, seed + 1)
    order, other = torch.randperm(n), torch.randperm(m)
    expected = row_logsumexp(x, y, scale=scale)[order]
    torch.testing.assert_close(row_logsumexp(x[order], y[other], scale=scale), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(_sizes, _sizes, st.floats(-1e4, 1e4), st.integers(0, 99))
def test_a_shift_of_the_bias_moves_every_row_by_it(n, m, shift, seed):
    x, y, bias = rows(n, 3, seed), rows(m, 3, seed + 1), rows(m, 2, seed)[:, 0]
    base = row_logsumexp(x, y, scale=2.0, bias=bias)
    torch.testing.assert_close(row_logsumexp(x, y, scale=2.0, bias=bias + shift), base + shift, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(_sizes, _sizes, _sizes, st.floats(0.01, 1000))
def test_more_columns_add_up(n, m, k, scale):
    x, y, z = rows(n, 4, 0), rows(m, 4, 1), rows(k, 4, 2)
    whole = row_logsumexp(x, torch.cat([y, z]), scale=scale)
    parts = torch.logaddexp(row_logsumexp(x, y, scale=scale), row_logsumexp(x, z, scale=scale))
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(_sizes, _sizes, st.floats(0.01, 1000))
def test_both_directions_are_rows_of_the_matrix_and_of_its_transpose(n, m, scale):
    x, y = rows(n, 4, 0), rows(m, 4, 1)
    found = bidirectional_logsumexp(x, y, scale=scale)
    torch.testing.assert_close(found[0], row_logsumexp(x, y, scale=scale), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], row_logsumexp(y, x, scale=scale), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", _BACKENDS)
@pytest.mark.parametrize("scale", [0.0, 10.0, 300.0])
def test_a_single_row_without_itself_is_minus_infinity_and_passes_no_gradient(backend, scale):
    x = rows(1, 4, 0, torch.float32).requires_grad_()
    y = rows(1, 4, 1, torch.float32).requires_grad_()
    for other in (x, y):
        lse = row_logsumexp(x, other, scale=scale, exclude_self=True, unit_norm=True, backend=backend)
        assert lse.item() == -math.inf
        if backend != "eager":  # autograd of the plain form gives NaN here
            for gradient in torch.autograd.grad(lse.sum(), {x, other}):
                assert gradient.abs().max() == 0


@pytest.mark.parametrize("backend", _BACKENDS)
def test_a_key_of_bias_minus_infinity_is_not_there(backend):
    x, y = rows(5, 4, 0, torch.float32).requires_grad_(), rows(6, 4, 1, torch.float32).requires_grad_()
    bias = torch.zeros(6)
    bias[[0, 3]] = -torch.inf
    got = row_logsumexp(x, y, scale=2.0, bias=bias, backend=backend)
    torch.testing.assert_close(got, row_logsumexp(x, y[[1, 2, 4, 5]], scale=2.0, backend="eager"))
    got.sum().backward()
    assert y.grad[[0, 3]].abs().max() < 1e-20


@pytest.mark.parametrize("backend", _BACKENDS)
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_a_nan_stays_in_its_row(backend, scale):
    x, y = rows(5, 4, 0, torch.float32), rows(6, 4, 1, torch.float32)
    x[2, 1] = torch.nan
    x.requires_grad_()
    lse = row_logsumexp(x, y, scale=scale, unit_norm=True, backend=backend)
    lse.sum().backward()
    for found in (lse, x.grad[:, 0]):
        assert found.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("backend", _BACKENDS)
def test_strided_rows_and_features_are_read_where_they_lie(backend):
    wide = rows(8, 12, 0, torch.float32)
    for view in (wide[:, 2:7], wide[::2], wide.T, wide[:, ::3]):
        expected = row_logsumexp(view.contiguous(), view.contiguous(), scale=2.0, backend="eager")
        torch.testing.assert_close(row_logsumexp(view, view, scale=2.0, backend=backend), expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_only_what_needs_a_gradient_gets_one(backend):
    for of_x, of_y in ((True, False), (False, True)):
        x = rows(5, 4, 0, torch.float32).requires_grad_(of_x)
        y = rows(6, 4, 1, torch.float32).requires_grad_(of_y)
        row_logsumexp(x, y, scale=2.0, backend=backend).sum().backward()
        assert (x.grad is not None, y.grad is not None) == (of_x, of_y)


def test_the_same_bits_every_time():
    z = rows(1700, 64, 0, torch.float32).requires_grad_()
    runs = []
    for _ in range(2):
        lse = row_logsumexp(z, z, scale=10.0, exclude_self=True)
        runs.append((lse, *torch.autograd.grad(lse.mean(), z)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(0, 4), torch.zeros(3, 4), {}, r"x must be \[N, D\] with N >= 1 and D >= 1, got \(0, 4\)"),
        (torch.zeros(3, 4), torch.zeros(3, 0), {}, r"y must be .* got \(3, 0\)"),
        (torch.zeros(3), torch.zeros(3, 4), {}, r"x must be .* got \(3,\)"),
        (torch.zeros(3, 4), torch.zeros(3, 5), {}, r"same D, got \(3, 4\) and \(3, 5\)"),
        (torch.zeros(3, 4), torch.zeros(3, 4).half(), {}, r"one type and device.*float32.*float16"),
        (torch.zeros(3, 4).int(), torch.zeros(3, 4).int(), {}, "x must be floating point, got torch.int32"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"scale": math.nan}, "scale must be finite, got nan"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"scale": torch.ones(2)}, r"scale must be one number.*\(2,\)"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"bias": torch.zeros(4)}, r"bias must be one number a row of y, \[3\]"),
        (
            torch.zeros(3, 4),
            torch.zeros(3, 4),
            {"bias": torch.zeros(3), "group": object()},
            "bias does not cross ranks",
        ),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"backend": "cuda"}, "backend must be one of auto, triton, cpu, eager"),
    ],
)
def test_what_does_not_fit_is_named(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        row_logsumexp(x, y, **{"scale": 1.0, **options})
